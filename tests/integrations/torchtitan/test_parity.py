"""A swapped TorchTitan model trains exactly as stock does, from one seed checkpoint, under every parallelism."""

from pathlib import Path

import pytest
import torch

from ... import processes
from . import jobs

SINGLE = {"one process": []}
COMPILED = {"compiled": ["compile.enable=true"]}
PARALLEL = {
    "FSDP2": [],
    "FSDP2, selective checkpointing": [
        "activation_checkpoint.mode=selective",
        "activation_checkpoint.selective_ac_option=op",
    ],
    "TP2": ["parallelism.tensor_parallel_degree=2"],
    "PP2": ["parallelism.pipeline_parallel_degree=2"],
}


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    root = tmp_path_factory.mktemp("llama3")
    tables = jobs.tables_of("llama3", "debugmodel", root / "run")
    processes.run(jobs.write_seed_checkpoint, tables, root, processes=1)
    return tables, root


def compare(model: tuple[dict, Path], layouts: dict[str, list[str]], world_size: int) -> None:
    tables, root = model
    processes.run(jobs.stock_and_swapped, tables, layouts, root, processes=world_size)
    losses = jobs.read_losses(root)
    for layout in layouts:
        stock, swapped = losses[layout]["stock"], losses[layout]["flashmoe"]
        assert len(stock) == 8 and stock[-1] < stock[0] - 0.5, f"{layout}: stock does not learn: {stock}"
        torch.testing.assert_close(swapped, stock, rtol=1e-5, atol=1e-5, msg=lambda m, layout=layout: f"{layout}: {m}")


def test_llama3_one_process(llama3: tuple[dict, Path]) -> None:
    compare(llama3, SINGLE, world_size=1)


def test_llama3_parallel(llama3: tuple[dict, Path]) -> None:
    compare(llama3, PARALLEL, world_size=2)


@pytest.mark.slow
def test_llama3_compiled(llama3: tuple[dict, Path]) -> None:
    compare(llama3, COMPILED, world_size=1)
