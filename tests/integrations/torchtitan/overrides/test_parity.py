"""Losses of recipes under TorchTitan 0.3.x, from one seed checkpoint of the stock model, in float32.

Stock attention has no CPU kernels there, so one process with swapped attention alone is the yardstick; that it equals
flex attention is shown in `test_attention`.
"""

import contextlib
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.common.moe import GroupedExperts

from .... import processes
from ....ops.operators import CountOperators
from .runs import MODELS, STEPS, texts, train, write_seed

ROWS = "training.global_batch_size=8"  # on two data-parallel processes each sees what one process alone would
LAYOUTS = {
    "FSDP2": [ROWS, "parallel.expert=1"],
    "TP2": ["parallel.tensor=2", "parallel.expert=1"],
    "PP2": ["parallel.pipeline=2", "parallel.expert=1", "training.micro_batch_size=2"],
    "FSDP2+EP2": [ROWS, "parallel.expert=2"],
    "TP2+EP2": ["parallel.tensor=2", "parallel.expert=2"],
}
LAYERS = 2


def unrounded(experts: GroupedExperts, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Stock's experts, one after the other in the dtype of x: stock's own round to bfloat16."""
    outs = []
    weights = zip(experts.w1_EFD, experts.w2_EDF, experts.w3_EFD, strict=True)
    for rows, (w1, w2, w3) in zip(x.split(counts.tolist()), weights, strict=True):
        outs.append((F.silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T)
    return torch.cat(outs)


def _alone(name: str, root: Path) -> None:
    """One process: attention alone swapped, everything swapped, and that under selective checkpointing."""
    write_seed(name, root)
    found = {}
    for key, overrides in {
        "attention": ("swap.moe=stock",),
        "everything": (),
        "checkpointing": ("training.activation_checkpointing=selective",),
    }.items():
        stock = mock.patch.object(GroupedExperts, "forward", unrounded)
        with stock if key == "attention" else contextlib.nullcontext(), CountOperators() as counter:
            losses, trainer = train(name, root, *overrides)
        found[key] = losses, dict(counter.counts), len(trainer.expert_load.blocks)
    (root / "alone.json").write_text(json.dumps(found))


_alone_once: dict[str, tuple[str, Path, dict]] = {}  # pytest would make a fixture again for every layout


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    name = request.param
    if name not in _alone_once:
        root = tmp_path_factory.mktemp(name)
        texts(root / "texts.jsonl")
        processes.run(_alone, name, root, processes=1)
        _alone_once[name] = name, root, json.loads((root / "alone.json").read_text())
    return _alone_once[name]


def test_learns(model: tuple[str, Path, dict]) -> None:
    _, _, alone = model
    losses, _, _ = alone["everything"]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1.5


def test_swapped_experts_dispatch_and_checkpointing_equal_attention_alone(model: tuple[str, Path, dict]) -> None:
    _, _, alone = model
    wanted = alone["attention"][0]
    for key in ("everything", "checkpointing"):
        torch.testing.assert_close(alone[key][0], wanted, rtol=0, atol=1e-4)


def test_operators_run_once_a_layer_whether_checkpointed_or_not(model: tuple[str, Path, dict]) -> None:
    """What is not kept would run again in backward."""
    _, _, alone = model
    for _, counts, blocks in (alone["everything"], alone["checkpointing"]):
        assert counts["attention_forward"] == counts["attention_backward"] == LAYERS * STEPS
        assert counts.get("moe_forward", 0) == counts.get("moe_down_backward", 0) == blocks * STEPS
        assert counts.get("moe_permute", 0) == counts.get("moe_combine", 0) == 0  # they are parts of the one operator
    assert alone["attention"][1].get("moe_forward", 0) == 0


def _two(name: str, root: Path, layout: str) -> None:
    losses, trainer = train(name, root, *LAYOUTS[layout])
    if trainer.monitor is not None:  # the process that knows the loss
        (root / f"{layout}.json").write_text(json.dumps(losses))


CASES = [(name, layout) for name in MODELS for layout in LAYOUTS if name != "llama3_debug" or "EP" not in layout]


@pytest.mark.parametrize("model, layout", CASES, indirect=["model"])
def test_layouts_equal_one_process(model: tuple[str, Path, dict], layout: str) -> None:
    name, root, alone = model
    processes.run(_two, name, root, layout)
    found = json.loads((root / f"{layout}.json").read_text())
    torch.testing.assert_close(found, alone["attention"][0], rtol=0, atol=1e-4)


def _compiled(name: str, root: Path) -> None:
    losses, _ = train(name, root, "training.compile=true")
    (root / "compiled.json").write_text(json.dumps(losses))


def test_compiled_equals_not_compiled(model: tuple[str, Path, dict]) -> None:
    name, root, alone = model
    processes.run(_compiled, name, root, processes=1)
    torch.testing.assert_close(
        json.loads((root / "compiled.json").read_text()), alone["attention"][0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "name, layout", [case for case in CASES if case[0] != "qwen3_moe_debug" and "PP" not in case[1]]
)
def test_spmd_types(name: str, layout: str, tmp_path: Path) -> None:
    """TorchTitan's checker follows every tensor of a step, and raises where processes hold what they should not."""
    texts(tmp_path / "texts.jsonl")
    processes.run(_typed, name, tmp_path, layout)


def _typed(name: str, root: Path, layout: str) -> None:
    typed = ("torchtitan.debug.spmd_typechecking=true", "training.steps=1")
    train(name, root, *LAYOUTS[layout], *typed, from_seed=False)
