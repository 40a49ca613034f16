"""Runs a test's function on several processes over gloo, and fails with their traceback."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flashmoe_train import launch


def _entry(
    rank: int, world_size: int, port: int, timeout: timedelta | None, function: Callable[..., None], arguments: tuple
) -> None:
    join(rank, world_size, port, timeout=timeout)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def join(rank: int, world_size: int, port: int, backend: str = "gloo", timeout: timedelta | None = None) -> None:
    """Makes this process one of several; with NCCL each has a GPU, or shares those that there are.

    `timeout`: of collectives, instead of PyTorch's.
    """
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    if backend == "nccl":
        launch.share_gpus(rank, world_size)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timeout)


def need_gpus(count: int) -> None:
    """Skips a test where there are fewer GPUs, unless its processes are to share them."""
    if torch.cuda.device_count() < (1 if os.environ.get("FLASHMOE_SHARE_GPUS") == "1" else count):
        pytest.skip(f"needs {count} GPUs, or FLASHMOE_SHARE_GPUS=1, with which processes share one")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(
    function: Callable[..., None], *arguments: object, processes: int = 2, timeout: timedelta | None = None
) -> None:
    """Calls `function(*arguments)`, a function of a module, in every process."""
    start(_entry, processes, free_port(), timeout, function, arguments, processes=processes)


def start(function: Callable[..., None], *arguments: object, processes: int) -> None:
    """Calls `function(rank, *arguments)` in new processes and waits for them.

    They are forked from a server that has imported what takes seconds, and has started no thread; not where there is a
    GPU, since what is imported asks it for its properties, and CUDA does not survive a fork.
    """
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.set_forkserver_preload(
        ["flashmoe_train.integrations.torchtitan.runner", "tests.integrations.megatron.preload"]
    )
    mp.start_processes(_share_cores, args=(processes, function, arguments), nprocs=processes, start_method=method)


def _share_cores(rank: int, processes: int, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    function(rank, *arguments)
