"""A swapped Megatron model trains as stock does, under every parallelism, resumes bit by bit, and loads what stock has
saved as stock loads what it has."""

from pathlib import Path

import pytest
import torch

from ... import processes
from . import jobs

ONE: list[str] = []
DP2: list[str] = ["training.micro_batch_size=2"]
TP2 = ["parallel.tensor=2"]
PP2 = ["parallel.pipeline=2"]
EP2 = ["parallel.expert=2"]

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "model, world_size, layouts",
    [
        ("dense", 1, {"one process": ONE}),
        ("moe", 1, {"one process": ONE}),
        ("mla", 1, {"one process": ONE}),
        pytest.param("dense", 2, {"DP2": DP2, "TP2 + SP": TP2, "PP2": PP2}, marks=slow),
        pytest.param("moe", 2, {"DP2": DP2, "TP2 + SP": TP2, "PP2": PP2, "EP2": EP2}, marks=slow),
        pytest.param("mla", 2, {"DP2": DP2, "TP2 + SP": TP2, "PP2": PP2, "EP2": EP2}, marks=slow),
        pytest.param("moe", 4, {"TP2 + EP2": TP2 + EP2}, marks=slow),
        pytest.param("mla", 4, {"TP2 + EP2": TP2 + EP2}, marks=slow),
    ],
)
def test_swapped_equals_stock(model: str, world_size: int, layouts: dict[str, list[str]], tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(jobs.matrix, model, layouts, tmp_path, processes=world_size)
    for layout, overrides in layouts.items():
        found = jobs.read(tmp_path, layout)
        stock, swapped = found["stock"], found["flashmoe"]
        assert len(stock.losses) == jobs.STEPS and stock.losses[-1] < stock.losses[0] - 0.3, f"{layout}: {stock}"
        difference = max(abs(a - b) for a, b in zip(stock.losses, swapped.losses, strict=True))
        print(f"{model} {layout}: largest difference {difference:.1e}")
        assert difference <= 1e-5, f"{layout}: {stock}, {swapped}"
        torch.testing.assert_close(swapped.grad_norms, stock.grad_norms, rtol=1e-4, atol=0)
        half = jobs.STEPS // 2
        if EP2[0] in overrides:
            ours = found["dispatch"]
            torch.testing.assert_close(ours.losses, stock.losses, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.grad_norms, stock.grad_norms, rtol=1e-4, atol=0)
            assert found["dispatch from dispatch"] == jobs.Run(ours.losses[half:], ours.grad_norms[half:])
        assert found["flashmoe from flashmoe"].losses == swapped.losses[half:], f"{layout}: not bit by bit"
        assert found["flashmoe from flashmoe"].grad_norms == swapped.grad_norms[half:]
        for other in ("flashmoe from stock", "stock from flashmoe"):
            torch.testing.assert_close(found[other].losses, stock.losses[half:], rtol=0, atol=1e-5)
