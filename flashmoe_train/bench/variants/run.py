"""Runs a study's variants, each in processes of its own, and shows what came out in one table."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashmoe_train.bench.measure import Case
from flashmoe_train.bench.report import FAILED, NOTHING, STYLES
from flashmoe_train.bench.results import EVERYBODY, Results, Row, here
from flashmoe_train.bench.variants import Study, build, worker
from flashmoe_train.bench.variants.build import Build, Built
from flashmoe_train.bench.variants.library import summary
from flashmoe_train.bench.variants.worker import Timing, Verdict

START = 120  # seconds for what is not launching: imports, the first use of the GPU, references
TIMING = 420  # seconds that all timing may take


class Outcome(Built):
    """A variant, and what is wrong with it."""

    problem: str = ""


class Measured(Results):
    """What `run` writes. In the rows every variant is an implementation."""

    variants: dict[str, Outcome] = Field(default_factory=dict)


@dataclass
class Timed:
    """What came of timing several variants."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)  # variants that did not get through, and why
    problem: str = ""  # with all of it


@dataclass(frozen=True)
class Runner:
    """Everything that the processes of one run have in common."""

    study_name: str  # as it was typed
    study: Study
    folder: Path
    device: torch.device
    limit: float  # seconds that a launch may take

    def check(self, name: str, cases: Sequence[Case]) -> str:
        """What is wrong with a variant, in a line; empty if nothing is."""
        verdict = self._check(name, cases, watchdog=False)
        if not verdict.problem:
            return ""
        text = f"{verdict.case}: {verdict.problem}" if verdict.case else verdict.problem
        if verdict.hung and build.library(self.folder, name, watchdog=True).exists():
            watched = self._check(name, [case for case in cases if case.label == verdict.case], watchdog=True)
            text += f"; watchdog: {summary(watched.hangs) or watched.problem}"
        return text

    def _check(self, name: str, cases: Sequence[Case], watchdog: bool) -> Verdict:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "verdict.json"
            problem = self._start([name], cases, out, self.limit + START, watchdog=watchdog)
            verdict = Verdict.model_validate_json(out.read_bytes()) if out.exists() else Verdict()
        if problem and not verdict.hung:
            verdict.problem = problem
        return verdict

    def measure(self, names: Sequence[str], cases: Sequence[Case]) -> Timed:
        """Rows of all cases, as far as nothing but a variant goes wrong: the others go on without that."""
        timed = Timed()
        left = list(names)
        while left and cases:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "timing.json"
                problem = self._start(left, cases, out, TIMING, timed=True)
                timing = Timing.model_validate_json(out.read_bytes()) if out.exists() else Timing()
            timed.rows += timing.rows
            cases = cases[len(timing.rows) :]
            if not timing.lost:
                timed.problem = problem
                break
            timed.lost[timing.lost] = f"{cases[0].label}: {timing.problem}"
            left.remove(timing.lost)
        return timed

    def _start(
        self,
        names: Sequence[str],
        cases: Sequence[Case],
        out: Path,
        timeout: float,
        watchdog: bool = False,
        timed: bool = False,
    ) -> str:
        """A process of `worker`; what went wrong with it."""
        order: dict[str, Any] = {
            "study": self.study_name,
            "folder": str(self.folder),
            "out": str(out),
            "device": str(self.device),
            "variants": list(names),
            "cases": [case.label for case in cases],
            "watchdog": watchdog,
            "timed": timed,
            "limit": self.limit,
        }
        command = [sys.executable, "-m", worker.__name__, json.dumps(order)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"no end after {timeout:g} s"
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            return f"its process ended with {done.returncode}: {last[0][:200]}"
        return ""


def run(runner: Runner, built: Build, names: Sequence[str], cases: Sequence[Case], jobs: int) -> Measured:
    """Checks `names`, `jobs` at a time, then times those that are right."""
    with ThreadPoolExecutor(jobs) as pool:
        checked = pool.map(lambda name: built.variants[name].failed or runner.check(name, runner.study.checks), names)
        outcomes = {
            name: Outcome(**built.variants[name].model_dump(), problem=problem)
            for name, problem in zip(names, checked, strict=True)
        }
    right = [name for name in names if not outcomes[name].problem]
    timed = runner.measure(right, cases)
    for name, problem in timed.lost.items():
        outcomes[name].problem = problem
    about = here(f"variants_{built.study}", "", runner.device).model_dump()
    measured = Measured(**about | {"commit": built.commit}, variants=outcomes)
    measured.rows = timed.rows
    if timed.problem:
        case = cases[min(len(timed.rows), len(cases) - 1)]
        measured.rows.append(Row(case=case.as_json(), label=case.label, failed={EVERYBODY: f"timing: {timed.problem}"}))
    return measured


# --------------------------------------------------------------------------------------------------------------- table


def lines(measured: Measured) -> list[list[str]]:
    """The table as text, headings first: every case and implementation, then those that have no time at all."""
    found = [["case", "", "µs", rate_unit(measured), "ratio", "registers", "spills", "HGMMA", "note"]]
    for row in measured.rows:
        library, rates = _library(measured, row), row.tflops or row.gb_per_s
        for name, ms in row.ms.items():
            ratio = f"{row.ms[library] / ms:.3f} {library}" if library not in (None, name) else NOTHING
            built = measured.variants.get(name)
            found.append([row.label, name, f"{ms * 1e3:.1f}", f"{rates[name]:.0f}", ratio, *_cells(built)])
        found += [[row.label, name, *[NOTHING] * 6, FAILED] for name in row.failed if name != EVERYBODY]
    for name, outcome in measured.variants.items():
        if outcome.problem:
            found.append(["", name, *[NOTHING] * 3, *_cells(outcome)])
    return found


def matrix(measured: Measured, rows: Sequence[Row]) -> list[list[str]]:
    """For documents: a line for every implementation, a column for every case: its rate, × the library."""
    found = [["variant", *(row.label for row in rows)]]
    for name in dict.fromkeys(name for row in rows for name in row.ms):
        cells = []
        for row in rows:
            library, rates = _library(measured, row), row.tflops or row.gb_per_s
            ratio = f" ({row.ms[library] / row.ms[name]:.3f})" if name in row.ms and library not in (None, name) else ""
            cells.append(f"{rates[name]:.0f}{ratio}" if name in row.ms else NOTHING)
        found.append([name, *cells])
    return found


def rate_unit(measured: Measured) -> str:
    return "GB/s" if any(row.gb_per_s for row in measured.rows) else "TFLOP/s"


def _library(measured: Measured, row: Row) -> str | None:
    """The first baseline that ran."""
    return next((name for name in row.ms if name not in measured.variants), None)


def _cells(outcome: Outcome | None) -> list[str]:
    """Registers, spills, HGMMA and a note."""
    if outcome is None:
        return [NOTHING] * 3 + [""]
    readings = [outcome.registers, str(outcome.spilled), NOTHING if outcome.hgmma is None else str(outcome.hgmma)]
    return [*(readings if outcome.kernels else [NOTHING] * 3), FAILED if outcome.problem else outcome.short_notes]


def show(console: Console, study: Study, measured: Measured) -> None:
    """The table; below it what failed and what the compiler noted, at length."""
    headings, *body = lines(measured)
    table = Table(title=f"{study.title}: {measured.gpu}, torch {measured.torch}", box=box.SIMPLE)
    for i, name in enumerate(headings):
        table.add_column(name, justify="left" if i in (0, 1, 8) else "right", no_wrap=True)
    for before, line in pairwise([["", ""], *body]):
        if line[0] != before[0]:
            table.add_section()
        table.add_row(
            "" if line[0] == before[0] else line[0], *(Text(cell, style=STYLES.get(cell, "")) for cell in line[1:])
        )
    console.print(table)
    notes = [f"FAILED: {name}: {outcome.problem}" for name, outcome in measured.variants.items() if outcome.problem]
    notes += [f"not run: {name}: {why}" for name, why in measured.hoisted().skipped.items()]
    for row in measured.hoisted().rows:
        notes += [f"FAILED: {row.label}: {name}: {why}" for name, why in row.failed.items()]
        notes += [f"not run: {row.label}: {name}: {why}" for name, why in row.skipped.items()]
    notes += [f"{name}: {note}" for name, outcome in measured.variants.items() for note in outcome.notes]
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
