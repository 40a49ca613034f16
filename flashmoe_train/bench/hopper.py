"""Facts about Hopper GPUs that our kernels are designed by, measured: `python -m flashmoe_train.bench.hopper`.

Works from a checkout in which `make facts` has built two programs of tests/csrc/hopper/facts; shown in docs/hopper.md.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from flashmoe_train.bench.results import Results, Row, here
from flashmoe_train.errors import UsageError
from flashmoe_train.monitor import new_console
from flashmoe_train.train import usage_errors

NAME = "hopper"
_PROGRAMS = Path(__file__).parents[2] / "build"
_UNITS = {
    "adds": "GB/s of float32 terms",
    "exp2": "results of a multiply-add and 2^x",
    "gather": "GB/s into tiles of 128 × 64, nothing consumes them",
    "racecheck": "hazards that compute-sanitizer's racecheck reports (100 at most)",
}


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """The table of facts of one kind, headings first."""
    facts = [(row.label.partition(": ")[2], _values(row)) for row in rows]
    columns = list(dict.fromkeys(name for _, values in facts for name in values))
    lines = [["case", *columns]]
    for label, values in facts:
        numbers = (values[name] for name in columns)
        lines.append([label, *(f"{x:.0f}" if x >= 1000 else f"{x:.3g}" for x in numbers)])
    return lines


def _values(row: Row) -> dict[str, float]:
    """What is measured differs from table to table: one of a row's measures of its own."""
    return (row.model_extra or {})["values"]


def unit(rows: Sequence[Row]) -> str:
    return _UNITS[rows[0].case["table"]]


def _throughput() -> Iterator[tuple[str, str, str, float]]:
    """(table, label, column, value) as the program prints them."""
    for line in _run([_program("throughput")]).splitlines():
        table, label, column, value = line.split("\t")
        yield table, label, column, float(value)


def _races() -> Iterator[tuple[str, str, str, float]]:
    program = _program("races")
    for way in range(7):
        text = _run(["compute-sanitizer", "--tool", "racecheck", "--racecheck-report", "all", program, str(way)])
        found = re.search(r"RACECHECK SUMMARY: (\d+) hazards?", text)
        name = re.search(r"^(.+): no error$", text, re.M)
        if found is None or name is None:
            raise UsageError(f"compute-sanitizer said nothing of races, way {way}: {text[-500:]}")
        yield "racecheck", name[1], "hazards", float(found[1])


def _program(name: str) -> str:
    path = _PROGRAMS / f"flashmoe_hopper_{name}"
    if not path.exists():
        raise UsageError(f"{path} is not built: make facts (needs nvcc)")
    return str(path)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise UsageError(f"{command[0]} is not installed") from None
    if done.returncode:
        raise UsageError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout


def measure() -> Results:
    """Raises UsageError where there is no GPU, program or compute-sanitizer."""
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU here")
    results = here(NAME, "python -m flashmoe_train.bench.hopper", torch.device("cuda"))
    rows: dict[str, Row] = {}
    for table, label, column, value in (*_throughput(), *_races()):
        name = f"{table}: {label}"
        row = rows.setdefault(name, Row.model_validate({"case": {"table": table}, "label": name, "values": {}}))
        _values(row)[column] = value
    results.rows = [*rows.values()]
    return results


def main(json: Annotated[Path | None, typer.Option(help="A file for the results.")] = None) -> None:
    """Measures, shows and stores the facts."""
    with usage_errors():
        results = measure()
    console = new_console()
    for kind in _UNITS:
        rows = [row for row in results.rows if row.case["table"] == kind]
        heading, *lines = grid(rows)
        table = Table(*heading, title=unit(rows), title_justify="left", box=box.SIMPLE)
        for line in lines:
            table.add_row(*line)
        console.print(table, highlight=False)
    if json is not None:
        results.write(json)


if __name__ == "__main__":
    typer.run(main)
