"""Starts training on this machine: torchrun is the launcher, for a command that becomes it and for runs beside us."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from flashmoe_train.errors import USAGE_ERROR
from flashmoe_train.recipe import write
from flashmoe_train.schema import Recipe


def default_processes() -> int:
    """One per GPU. Without a GPU speed is not the point: two processes show what several GPUs will do."""
    return torch.cuda.device_count() or 2


def torchrun(arguments: list[str], processes: int, restarts: int = 0) -> None:
    """Runs `-m flashmoe_train.train` with these arguments on every process. If one of them fails, torchrun ends the
    others, and all are started again, at most `restarts` times and not after a usage error, which would come again;
    then this process ends too."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # torchrun would set one thread for each of several processes: share the cores out instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # A process that fails prints its own error; torchrun's reports of it would bury that.
    for module in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{module}").setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc-per-node={processes}", "--max-restarts=0"]
    for start in range(restarts + 1):
        try:
            # Torchrun's own restarts would not spare usage errors, and would leave new processes a store with what dead
            # ones have left in it, such as where their memory is.
            main([*options, "-m", "flashmoe_train.train", *arguments])
            return
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
        except SignalException as error:  # this process was to end, and torchrun has ended the others
            print(f"ended by {error.sigval.name}", file=sys.stderr)
            sys.exit(128 + error.sigval)
        killed = failure.exitcode < 0
        how = f"process {rank} " + (f"was ended by {failure.signal_name()}" if killed else "failed")
        if start == restarts or failure.exitcode == USAGE_ERROR:
            sys.exit(f"error: {how}" if killed else failure.exitcode)
        print(f"{how}: all processes start again, restart {start + 1} of {restarts}", file=sys.stderr)


def share_gpus(local_rank: int, processes: int) -> None:
    """For one of so many processes on this machine, before it touches a GPU: where GPUs are fewer, several processes
    share one. What they compute is right; a layout can be tried before there are the GPUs for it."""
    gpus = torch.cuda.device_count()
    if not 0 < gpus < processes:
        return
    if local_rank == 0:
        print(f"{processes} processes share {gpus} GPU{'s' * (gpus > 1)}: far slower than on as many")
    os.environ["LOCAL_RANK"] = str(local_rank % gpus)
    # NCCL lets processes share a GPU that it takes for those of different machines, which then talk over sockets.
    os.environ["NCCL_HOSTID"] = f"{os.uname().nodename}-{local_rank}"
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"


class RunError(Exception):
    """A run that did not end well; its text says why, in a line."""


# As exceptions end their tracebacks, of whatever rank, and as usage errors begin.
_REASON = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:[\w.]*(?:Error|Exception|Unsupported)|error): \S.*)")


def reason(output: str, errors: str) -> str:
    """Why a run failed: the last line that names an error, or else the last of all; empty if there is none."""
    lines = [line for line in f"{output}\n{errors}".splitlines() if line.strip()]
    named = [found[1] for line in lines if (found := _REASON.match(line))]
    return (named or lines or [""])[-1]


def train(recipe: Recipe, processes: int, *, allow_fallback: bool, show: bool) -> dict[str, Any]:
    """Runs `flashmoe train` on the recipe in processes of their own; returns the content of its summary.json, which a
    run that writes a seed checkpoint does not have.

    Its output goes to the screen if `show`. Raises RunError if it fails.
    """
    folder = Path(str(recipe.folder))
    folder.mkdir(parents=True, exist_ok=True)
    write(recipe, folder / "recipe.toml")
    arguments = ["flashmoe_train.cli", "train", str(folder / "recipe.toml"), f"--processes={processes}"]
    run([*arguments, *["--allow-fallback"] * allow_fallback], show=show)
    summary = folder / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else {}


def run(module: list[str], *, show: bool) -> None:
    """Runs `python -m` with these arguments. Raises RunError if it fails."""
    command = [sys.executable, "-m", *module]
    if show:
        done: subprocess.CompletedProcess[str] = subprocess.run(command, text=True)
    else:
        done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        raise RunError(reason(done.stdout or "", done.stderr or "") or f"ended with {done.returncode}")
