"""The `flashmoe` command."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from flashmoe_train import recipe as recipes
from flashmoe_train.errors import UsageError
from flashmoe_train.train import AllowFallback, Overrides, Recipe

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def flashmoe() -> None:
    """Trains mixture-of-experts transformers with fast attention and MoE operators."""


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes on this machine; default: one per GPU, 2 without a GPU.", min=1)
    ] = None,
    allow_fallback: AllowFallback = False,
) -> None:
    """Trains RECIPE on this machine, under torchrun."""
    try:
        recipes.load(recipes.find(recipe), overrides or [])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    # Without a GPU speed is not the point: two processes show what several GPUs will do.
    processes = processes or torch.cuda.device_count() or 2
    # torchrun would set one thread for each of several processes: share the cores out instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    _torchrun(
        ["--standalone", f"--nproc-per-node={processes}", "-m", "flashmoe_train.train", recipe, *(overrides or [])]
        + ["--allow-fallback"] * allow_fallback
    )


@app.command()
def bench(
    subject: Annotated[
        str, typer.Argument(help="attention, moe, expert-parallel, train; or one bench, such as moe_parts.")
    ],
    cases: Annotated[
        str | None,
        typer.Option(
            help="standard (the default on a GPU), tiny, a pattern of labels ('*causal*'), a recipe to train."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write results to a folder, or one bench's to a .json file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw results into a folder, or one bench's to a .png file.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Stored results (file or folder): end with 1 if a ratio got worse.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="How much worse a ratio may be, as a part of it.", min=0)] = 0.05,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is a GPU.")] = None,
) -> None:
    """Measures operators beside every baseline that is installed, after checking each result against float64."""
    from flashmoe_train.bench import Options, run

    try:
        code = run(Options(subject, cases, json, plot, against, tolerance, device))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # A process that fails prints its own error; torchrun's reports of it would bury that.
    for module in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{module}").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.exit(f"error: process {rank} was ended by {failure.signal_name()}")
        sys.exit(failure.exitcode)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
