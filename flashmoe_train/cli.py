"""The `flashmoe` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flashmoe_train import integrations, launch
from flashmoe_train import recipe as recipes
from flashmoe_train.errors import UsageError
from flashmoe_train.monitor import new_console
from flashmoe_train.train import AllowFallback, Overrides, Recipe, usage_errors

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def flashmoe() -> None:
    """Trains mixture-of-experts transformers with fast attention and MoE operators."""


Processes = Annotated[
    int | None, typer.Option(help="Processes on this machine; default: one per GPU, 2 without a GPU.", min=1)
]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Processes = None,
    allow_fallback: AllowFallback = False,
    restarts: Annotated[
        int, typer.Option(help="Start all processes again if one fails, from the newest checkpoint; so often.", min=0)
    ] = 0,
) -> None:
    """Trains RECIPE on this machine, under torchrun."""
    with usage_errors():
        loaded = recipes.load(recipe, overrides or [])
        own = loaded.torchtitan.get("checkpoint", {})
        keeps = loaded.checkpoint.every or not isinstance(own, dict) or own.get("enable")  # no table: refused later
        if restarts and not keeps:
            raise UsageError(
                f"--restarts {restarts}: without checkpoints a run would begin anew; say [checkpoint] every, found none"
            )
    arguments = [recipe, *(overrides or []), *["--allow-fallback"] * allow_fallback]
    launch.torchrun(arguments, processes or launch.default_processes(), restarts)


@app.command()
def explain(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Processes = None,
    everything: Annotated[bool, typer.Option("--all", help="List the framework's own defaults too.")] = False,
) -> None:
    """Shows what RECIPE comes to: its model, what the framework is told, what would be swapped. Trains nothing."""
    with usage_errors():
        loaded = recipes.load(recipe, overrides or [])
        framework = integrations.part(loaded.framework, "explain")
        framework.explain(loaded, processes or launch.default_processes(), everything).print(new_console())


@app.command()
def compare(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Processes = None,
    allow_fallback: AllowFallback = False,
    tolerance: Annotated[
        float | None, typer.Option(help="End with 1 if a step's losses differ by more.", min=0)
    ] = None,
) -> None:
    """Trains RECIPE as stock and swapped from the same weights; compares losses, speed and memory."""
    from flashmoe_train.compare import compare

    with usage_errors():
        loaded = recipes.load(recipe, overrides or [])
        try:
            difference = compare(loaded, processes or launch.default_processes(), allow_fallback, new_console())
        except launch.RunError as error:
            sys.exit(f"error: {error}")
    if tolerance is not None and not difference <= tolerance:
        sys.exit(f"error: the losses differ by {difference:.1e}, more than {tolerance:.1e}")


@app.command()
def doctor() -> None:
    """Says what this machine has and what runs on it; ends with 1 if `flashmoe train` cannot."""
    from flashmoe_train.doctor import report

    raise SystemExit(0 if report(new_console()) else 1)


@app.command()
def swap_check(
    model: Annotated[
        str,
        typer.Argument(help="A Transformers family (qwen3_moe), or a Python file that defines model() and inputs()."),
    ],
) -> None:
    """Shows what `flashmoe_train.swap` makes of MODEL; compares outputs and gradients, ends with 1 if they differ."""
    from flashmoe_train.swap_check import check

    with usage_errors():
        same = check(model, new_console())
    raise SystemExit(0 if same else 1)


@app.command()
def bench(
    subject: Annotated[
        str,
        typer.Argument(
            help="attention, moe, expert-parallel, transformers, train, profile; or one bench, such as moe_parts."
        ),
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

    with usage_errors():
        code = run(Options(subject, cases, json, plot, against, tolerance, device))
    raise SystemExit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
