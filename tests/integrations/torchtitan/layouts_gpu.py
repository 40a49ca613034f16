"""What the tests on GPUs run in their processes: many layouts of one small model, one after another."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ... import processes
from . import jobs


def entry(
    rank: int, world: int, port: int, tables: dict[str, Any], sizes: jobs.Sizes, layouts: Any, root: Path
) -> None:
    """One of `world` processes, on GPUs: trains every layout as stock and swapped and, where experts are
    shared, with our exchange. A run that fails says why in a file and does not keep the next from running."""
    processes.join(rank, world, port, "nccl")
    for layout, overrides in layouts.items():
        for choice in jobs.choices(overrides):
            name = run_name(layout, choice)
            try:
                jobs.one_choice(tables, sizes, choice, overrides, name, root)
            except Exception as error:
                (root / f"failed_{rank}_{name.replace(' ', '')}.json").write_text(json.dumps([name, repr(error)]))
    dist.barrier()
    dist.destroy_process_group()


def run_name(layout: str, choice: str) -> str:
    return f"{layout} by {choice}"


def seed(rank: int, port: int, tables: dict[str, Any], sizes: jobs.Sizes, root: Path) -> None:
    """In a process of its own, before the others: writes the weights that all start from."""
    processes.join(rank, 1, port, "nccl")
    jobs.write_seed_checkpoint(tables, sizes, root)
    dist.destroy_process_group()
