"""The program that torchrun starts on every process: `torchrun ... -m flashmoe_train.train RECIPE [key=value ...]`."""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from flashmoe_train import integrations, launch
from flashmoe_train import recipe as recipes
from flashmoe_train.errors import USAGE_ERROR, UsageError

Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that ships with the package.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="table.key=value: replaces a value of the recipe.", show_default=False)
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Train on PyTorch's own kernels where ours are missing.")
]


def train(recipe: str, overrides: list[str], allow_fallback: bool) -> None:
    """Trains a recipe in this process; all processes of the run call it."""
    loaded = recipes.load(recipe, overrides)
    if "WORLD_SIZE" not in os.environ:
        raise UsageError("this program is started by torchrun; `flashmoe train` does that for you")
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun says it, other launchers may not
        launch.share_gpus(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    runner = integrations.part(loaded.framework, "runner")
    kept = [override for override in overrides if not override.startswith("training.steps=")]  # it suggests another
    command = shlex.join([command_name(), "train", recipe, *kept])
    runner.run(loaded, command, allow_fallback)


def command_name() -> str:
    """How the user starts `flashmoe` from here: by its path if its environment is not activated."""
    beside_python = Path(sys.executable).with_name("flashmoe")
    return "flashmoe" if shutil.which("flashmoe") or not beside_python.exists() else os.path.relpath(beside_python)


@contextlib.contextmanager
def usage_errors(patience: float = 0.0) -> Iterator[None]:
    """Ends the program with a UsageError's text and no traceback, after so many seconds in which another process may
    say the same: torchrun then ends this one. It ends all as soon as one has ended, so who waits must be silent."""
    try:
        yield
    except UsageError as error:
        time.sleep(patience)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def patience() -> float:
    """The first process of a run says what is wrong, and the others wait for it."""
    return 0 if os.environ.get("RANK", "0") == "0" else 20


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(recipe: Recipe, overrides: Overrides = None, allow_fallback: AllowFallback = False) -> None:
    """Trains RECIPE on this process of a torchrun job."""
    with usage_errors(patience()):
        train(recipe, overrides or [], allow_fallback)


if __name__ == "__main__":
    app()
