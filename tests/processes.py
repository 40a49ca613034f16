"""Runs a test's function on several processes over gloo, and fails with their traceback."""

import os
import socket
from collections.abc import Callable

import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    join(rank, world_size, port)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def join(rank: int, world_size: int, port: int) -> None:
    """Makes this process one of several."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    dist.init_process_group("gloo")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(function: Callable[..., None], *arguments: object, processes: int = 2) -> None:
    """Calls `function(*arguments)`, a function of a module, in every process."""
    mp.spawn(_entry, args=(processes, free_port(), function, arguments), nprocs=processes)
