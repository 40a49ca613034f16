"""A swapped TorchTitan model trains exactly as stock does, from one seed checkpoint, under every parallelism."""

from pathlib import Path

import pytest
import torch

from ... import processes
from . import jobs

FSDP2: list[str] = []
SELECTIVE = ["activation_checkpoint.mode=selective", "activation_checkpoint.selective_ac_option=op"]
TP2 = ["parallelism.tensor_parallel_degree=2"]
PP2 = ["parallelism.pipeline_parallel_degree=2"]
EP2 = ["parallelism.expert_parallel_degree=2"]
ETP2 = ["parallelism.expert_tensor_parallel_degree=2"]
FULL = ["activation_checkpoint.mode=full"]
COMPILED = ["compile.enable=true"]

# (model, flavor, tolerance): stock experts always compute in bfloat16, ours in the tokens' dtype, here float32.
LLAMA3 = ("llama3", "debugmodel", 1e-5)
DEEPSEEK = ("deepseek_v3", "debugmodel", 1e-4)
QWEN3 = ("qwen3", "debugmodel_moe", 1e-4)

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "model, world_size, layouts",
    [
        (LLAMA3, 1, {"one process": []}),
        (LLAMA3, 2, {"FSDP2": FSDP2, "FSDP2, selective": SELECTIVE, "TP2": TP2, "PP2": PP2}),
        (DEEPSEEK, 1, {"one process": [], "one process, full": FULL}),
        (DEEPSEEK, 2, {"FSDP2 + EP2": EP2}),
        pytest.param(DEEPSEEK, 2, {"FSDP2": FSDP2, "TP2": TP2, "PP2": PP2}, marks=slow),
        pytest.param(
            DEEPSEEK, 4, {"FSDP2 + TP2 + EP2": TP2 + EP2, "FSDP2 + TP2 + EP2 + ETP2": TP2 + EP2 + ETP2}, marks=slow
        ),
        pytest.param(QWEN3, 1, {"one process": []}, marks=slow),
        pytest.param(QWEN3, 2, {"FSDP2 + EP2": EP2, "TP2": TP2}, marks=slow),
        pytest.param(LLAMA3, 1, {"compiled": COMPILED}, marks=slow),
        pytest.param(DEEPSEEK, 1, {"compiled": COMPILED}, marks=slow),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_swapped_equals_stock(
    model: tuple[str, str, float], world_size: int, layouts: dict[str, list[str]], tmp_path: Path
) -> None:
    name, flavor, tolerance = model
    tables = jobs.tables_of(name, flavor, tmp_path / "run")
    processes.run(jobs.write_seed_checkpoint, tables, tmp_path, processes=1)
    processes.run(jobs.stock_and_swapped, tables, layouts, tmp_path, processes=world_size)
    losses = jobs.read_losses(tmp_path)
    for layout in layouts:
        stock, swapped = losses[layout]["stock"], losses[layout]["flashmoe"]
        assert len(stock) == 8 and stock[-1] < stock[0] - 0.5, f"{layout}: stock does not learn: {stock}"
        difference = (torch.tensor(swapped) - torch.tensor(stock)).abs().max().item()
        assert difference <= tolerance * max(stock), f"{layout}: stock {stock}, swapped {swapped}"
