"""Every parallelism on GPUs, in bfloat16, with our kernels: swapped modules train as stock does, from one checkpoint.

TorchTitan's debug models, with heads that our kernels take: a swap that runs PyTorch's would show nothing.

All layouts of one model and one number of GPUs are one start of processes. The test names all that failed, and prints
how far each was from stock. Where stock itself fails, which is printed, swapped modules have to learn as in the others.
"""

import copy
import json
from pathlib import Path

import pytest

from flashmoe_train.integrations.sizes import Sizes, check_kernels
from flashmoe_train.integrations.torchtitan.config import FlashMoE
from flashmoe_train.integrations.torchtitan.converters import compat, job

from ... import processes
from . import jobs
from .layouts_gpu import entry, run_name, seed
from .test_parity import COMPILED, CP2, EP2, FULL, HSDP2, PP2, SELECTIVE, TP2

pytestmark = pytest.mark.gpu

STEPS = ["training.steps=6"]
# The router has learnt nothing: all rows may come to one process.
EP4 = ["parallelism.expert_parallel_degree=4", "flashmoe.dispatch_capacity=4"]
CP4 = ["parallelism.context_parallel_degree=4"]
TP4 = ["parallelism.tensor_parallel_degree=4"]
# Where no FSDP is, TorchTitan trains in float32, for which there are none of our kernels.
IN_BFLOAT16 = ["training.dtype=bfloat16"]

LLAMA3 = {
    2: {
        "FSDP2": [],
        "FSDP2, compiled, selective": COMPILED + SELECTIVE,
        "TP2": TP2 + IN_BFLOAT16,
        "TP2, compiled, full": TP2 + IN_BFLOAT16 + COMPILED + FULL,
        "CP2": CP2,
        "CP2, compiled, selective": CP2 + COMPILED + SELECTIVE,
        "PP2": PP2 + IN_BFLOAT16,
        "PP2, compiled, full": PP2 + IN_BFLOAT16 + COMPILED + FULL,
    },
    4: {
        "HSDP2": HSDP2,
        "HSDP2, compiled, selective": HSDP2 + COMPILED + SELECTIVE,
        "FSDP2 + TP2, compiled, selective": TP2 + COMPILED + SELECTIVE,
        "TP4": TP4 + IN_BFLOAT16,
        "CP4, compiled": CP4 + COMPILED,
        "FSDP2 + CP2, selective": CP2 + SELECTIVE,
        "TP2 + CP2": TP2 + CP2,
        "PP2 + FSDP2, full": PP2 + FULL,
        "PP2 + TP2": PP2 + TP2 + IN_BFLOAT16,
    },
}
DEEPSEEK = {
    2: {
        "FSDP2 + EP2": EP2,
        "FSDP2 + EP2, compiled, selective": EP2 + COMPILED + SELECTIVE,
        "FSDP2 + EP2, compiled, full": EP2 + COMPILED + FULL,
        "TP2": TP2 + IN_BFLOAT16,
        "CP2 + EP2": CP2 + EP2,
        "PP2": PP2 + IN_BFLOAT16,
    },
    4: {
        "FSDP4 + EP4, compiled, selective": EP4 + COMPILED + SELECTIVE,
        "FSDP4 + EP2": EP2,
        "HSDP2 + EP2, full": HSDP2 + EP2 + FULL,
        "FSDP2 + TP2 + EP2": TP2 + EP2,
        "FSDP2 + TP2 + EP4, compiled, selective": TP2 + EP4 + COMPILED + SELECTIVE,
        "FSDP2 + CP2 + EP4": CP2 + EP4,
        "PP2 + EP2": PP2 + EP2,
        "PP2 + EP2, compiled, full": PP2 + EP2 + COMPILED + FULL,
    },
}
SIZES: dict[str, jobs.Sizes] = {
    "llama3": {"dim": 512, "n_heads": 8, "n_kv_heads": 4},
    "deepseek_v3": {"n_layers": 3},
}
# Over six steps, in bfloat16; gradients of stock's pipelines are hundreds of times too large, and clipped.
TOLERANCE = 2e-2


def sizes_of(model: str) -> Sizes:
    """Of the debug model as it is trained here."""
    flavor = copy.copy(job.get_train_spec(model).model_args["debugmodel"])
    jobs.resize(flavor, SIZES[model])
    return compat.sizes(flavor)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", ["llama3", "deepseek_v3"])
def test_swapped_equals_stock_on_gpus(model: str, world: int, tmp_path: Path) -> None:
    processes.need_gpus(world)
    sizes = SIZES[model]
    check_kernels(FlashMoE(attention="flashmoe", moe="flashmoe"), "bfloat16", sizes_of(model))
    chosen = {"llama3": LLAMA3, "deepseek_v3": DEEPSEEK}[model][world]
    layouts = {name: [*overrides, *STEPS] for name, overrides in chosen.items()}
    tables = jobs.tables_of(model, "debugmodel", tmp_path / "run")
    tables["training"] |= {"mixed_precision_param": "bfloat16", "seq_len": 256}
    processes.start(seed, processes.free_port(), tables, sizes, tmp_path, processes=1)
    processes.start(entry, world, processes.free_port(), tables, sizes, layouts, tmp_path, processes=world)
    failed = dict(json.loads(path.read_text()) for path in sorted(tmp_path.glob("failed_*.json")))
    losses = {name: next(iter(found.values())) for name, found in jobs.read_losses(tmp_path).items()}
    wrong = []
    for layout, overrides in layouts.items():
        for choice in jobs.choices(overrides):
            name = run_name(layout, choice)
            found, stock = losses.get(name), losses.get(run_name(layout, "stock"))
            if name in failed or found is None:
                print(f"{model} {name}: failed: {failed.get(name, 'no losses')[:1000]}")
                wrong += [name] * (choice != "stock")
                continue
            difference = max(abs(a - b) for a, b in zip(found, stock or found, strict=True))
            print(f"{model} {name}: {found[0]:.3f} to {found[-1]:.3f}, largest difference {difference:.1e}")
            if not difference <= TOLERANCE or not found[-1] < found[0] - 0.3:
                wrong.append(f"{name}: {found}, stock {stock}")
    assert not wrong, "\n".join(wrong)
