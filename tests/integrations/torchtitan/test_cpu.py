"""Random numbers of DTensors without a GPU: every layout begins with the weights that one process alone would have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan import runner

from ... import processes

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

SHAPES = [(8, 6), (5, 3), (1, 4)]  # the second gives processes unequal shards, the third nothing to some
PLACEMENTS = [(Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(0)), (Shard(0), Shard(1))]

SMALL = ("training.seq_len=32", "training.global_batch_size=4", "training.steps=1", "model.num_hidden_layers=2")
LAYOUTS = {
    "FSDP2": ("parallel.expert=1",),
    "FSDP2 + EP2": ("parallel.expert=2",),
    "TP2": ("parallel.tensor=2", "parallel.expert=1"),
    "FSDP2 + TP2 + EP2": ("parallel.tensor=2", "parallel.expert=2"),
    "HSDP2 + EP2": ("parallel.replicate=2", "parallel.expert=2"),
}
OVER_FOUR = ("FSDP2 + TP2 + EP2", "HSDP2 + EP2")


def fill(x: Tensor) -> list[Tensor]:
    """What is in x, one after the other; and what is drawn thereafter."""
    torch.manual_seed(7)
    fills = [
        lambda: nn.init.normal_(x, std=3.0),
        lambda: nn.init.kaiming_uniform_(x),
        lambda: nn.init.trunc_normal_(x, std=0.5, a=-0.6, b=0.6),  # a quarter is out of bounds and drawn again
        lambda: x.data.uniform_(1, 2).log_(),
    ]
    found = []
    for draw in fills:
        draw()
        found.append((x.full_tensor() if isinstance(x, DTensor) else x).detach().clone())
    return [*found, torch.rand(3)]


def _sharded() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for shape in SHAPES:
        wanted = fill(torch.empty(shape))
        tensors = [distribute_tensor(torch.empty(shape), mesh, placements) for placements in PLACEMENTS]
        # FSDP shards what tensor parallelism has sharded already: processes are not in the order of their rows.
        module = nn.ParameterDict({"x": distribute_tensor(torch.empty(shape), mesh["tensor"], [Shard(0)])})
        fully_shard(module, mesh=mesh["data"])
        assert isinstance(module["x"], DTensor) and module["x"].device_mesh.ndim == 2
        for x in (*tensors, module["x"]):
            torch.testing.assert_close(fill(x), wanted, rtol=0, atol=0)


@without_gpu
def test_fills_shards_as_one_process_fills_the_whole() -> None:
    processes.run(_sharded, processes=4)


def _weights(root: Path, *overrides: str) -> dict[str, Tensor]:
    """What a recipe's model begins with."""
    loaded = recipe.load("deepseek_v3_debug", [*SMALL, f"folder={root / 'run'}", *overrides])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"heldout": None})})
    trainer: Any = runner.MonitoredTrainer(runner.prepare(loaded, torch.distributed.get_world_size(), True))
    if trainer.monitor is not None:
        trainer.monitor.stop()
    state = trainer.model_parts[0].state_dict()
    found = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    trainer.close()
    return found


def _alone(path: Path) -> None:
    torch.save(_weights(path.parent), path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one process' weights."""
    path = tmp_path_factory.mktemp("alone") / "weights.pt"
    processes.run(_alone, path, processes=1)
    return path


def _together(alone: Path, root: Path, overrides: tuple[str, ...]) -> None:
    found, wanted = _weights(root, *overrides), torch.load(alone)
    assert found.keys() == wanted.keys() and len(wanted) > 20
    other = [name for name, x in found.items() if not torch.equal(x, wanted[name])]
    assert not other, f"other than in one process: {other}"


@without_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_begin_with_the_same_weights(layout: str, alone: Path, tmp_path: Path) -> None:
    world_size = 4 if layout in OVER_FOUR else 2
    processes.run(_together, alone, tmp_path, LAYOUTS[layout], processes=world_size)
