"""`python -m flashmoe_train.bench.variants`: see the package."""

import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from flashmoe_train.bench.report import FAILED, NOTHING
from flashmoe_train.bench.variants import build as builds
from flashmoe_train.bench.variants import load
from flashmoe_train.bench.variants import run as runs
from flashmoe_train.errors import UsageError
from flashmoe_train.monitor import new_console
from flashmoe_train.train import usage_errors

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

StudyName = Annotated[str, typer.Argument(help="A module of flashmoe_train/bench/variants, or a file.")]
Only = Annotated[str, typer.Option(help="Variants whose names match.")]
Folder = Annotated[Path, typer.Option(help="Where the built variants of all studies are.")]
FOLDER = Path("build/variants")


@app.command()
def build(
    study: StudyName,
    only: Only = "*",
    folder: Folder = FOLDER,
    jobs: Annotated[int, typer.Option(help="Compilers at a time.", min=1)] = 2,
) -> None:
    """Compiles a study's variants; ends with 1 if one does not compile."""
    with usage_errors():
        name, what = load(study)
        variants = {key: what.variants[key] for key in _matching([*what.variants], only)}
        built = builds.build(name, what, variants, folder / name, jobs)
    table = Table(title=f"{what.title}: {what.source}", box=box.SIMPLE)
    for heading in ("variant", "registers", "spills", "HGMMA", "seconds", "note"):
        table.add_column(heading, justify="left" if heading in ("variant", "note") else "right", no_wrap=True)
    for key, variant in built.variants.items():
        hgmma = NOTHING if variant.hgmma is None else str(variant.hgmma)
        numbers = [variant.registers, str(variant.spilled), hgmma, f"{variant.seconds:.1f}"]
        table.add_row(key, *numbers, FAILED if variant.failed else variant.short_notes)
    console = new_console()
    console.print(table, highlight=False, markup=False)
    for key, variant in built.variants.items():
        for note in [*([f"FAILED: {variant.failed}"] if variant.failed else []), *variant.notes]:
            console.print(f"{key}: {note}", highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(1 if any(variant.failed for variant in built.variants.values()) else 0)


@app.command()
def run(
    study: StudyName,
    only: Only = "*",
    cases: Annotated[str, typer.Option(help="Cases to time whose labels match.")] = "*",
    folder: Folder = FOLDER,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that a launch may take.", min=0.1)] = 10,
    jobs: Annotated[int, typer.Option(help="Variants checked at a time.", min=1)] = 4,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is a GPU.")] = None,
) -> None:
    """Checks every variant in a process of its own and times those that are right; ends with 1 if one is not."""
    with usage_errors():
        name, what = load(study)
        built = builds.read(folder / name)
        names = _matching([*built.variants], only)
        timed = [case for case in what.cases if fnmatchcase(case.label, cases)]
        if not timed:
            raise UsageError(f"no case matches {cases!r}; there are {', '.join(case.label for case in what.cases)}")
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    measured = runs.run(runs.Runner(study, what, folder / name, where, limit), built, names, timed, jobs)
    options = [("--only", only), ("--cases", cases)]
    words = ["python -m flashmoe_train.bench.variants run", study]
    measured.command = " ".join([*words, *(f"{o} {shlex.quote(v)}" for o, v in options if v != "*")])
    if json:
        measured.write(json)
    runs.show(new_console(), what, measured)
    wrong = any(outcome.problem for outcome in measured.variants.values()) or any(row.failed for row in measured.rows)
    raise SystemExit(1 if wrong else 0)


def _matching(names: list[str], pattern: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UsageError(f"no variant matches {pattern!r}; there are {', '.join(names)}")
    return found


if __name__ == "__main__":
    app()
