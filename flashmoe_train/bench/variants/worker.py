"""One process of a study: checks one variant alone, or times those that are right. Started by `run`.

What it finds is in its file before anything can go wrong with it: it may be killed at any time.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from flashmoe_train.bench.measure import Case, Contender, OperatorBench, Problem, free, reason
from flashmoe_train.bench.results import Row
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.bench.variants import Study, build, load
from flashmoe_train.bench.variants.library import Hang, Library


class Verdict(BaseModel):
    """On one variant."""

    case: str = ""  # where it went wrong, or is
    problem: str = "its process ended there"  # empty: all cases are right
    hung: bool = False
    hangs: list[Hang] = []  # of the watchdog


def check(study: Study, library: Library, cases: list[Case], limit: float, out: Path) -> Verdict:
    """Runs every case, up to the first that goes wrong."""

    def hang() -> None:
        late = Verdict(case=verdict.case, problem=f"no end after {limit:g} s", hung=True, hangs=library.hangs())
        out.write_text(late.model_dump_json())
        os._exit(1)  # nothing on this device can be waited for any more

    verdict = Verdict()
    for case in cases:
        verdict.case = case.label
        out.write_text(verdict.model_dump_json())
        trial = study.prepare(case, library.device)
        run = trial.run(library.launch)
        for _ in range(2):  # what the first leaves in a workspace is there for the second
            try:
                with deadline(limit, hang):
                    result = run()
                    if library.device.type == "cuda":
                        torch.cuda.synchronize(library.device)
                error = trial.error(result)
            except RuntimeError as failure:
                return Verdict(case=case.label, problem=reason(failure), hangs=library.hangs())
            if hangs := library.hangs():
                return Verdict(case=case.label, problem="a wait was given up", hung=True, hangs=hangs)
            if not error <= trial.error_bound:
                problem = f"relative error {error:.1e}, allowed {trial.error_bound:.0e}"
                return Verdict(case=case.label, problem=problem)
        free()
    return Verdict(problem="")


@contextmanager
def deadline(seconds: float, expired: Any) -> Iterator[None]:
    """Calls `expired`, from another thread, unless what is inside ends in time."""
    timer = threading.Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure(study: Study, libraries: dict[str, Library], cases: list[Case], device: torch.device, out: Path) -> None:
    """Writes a row for every case: the variants and the baselines in turns, each checked before it is timed."""

    def prepare(case: Any, device: torch.device) -> Problem:
        trial = study.prepare(case, device)
        variants: dict[str, Contender] = {
            name: partial(trial.run, library.launch) for name, library in libraries.items()
        }
        contenders = {**variants, **trial.baselines}
        return Problem(contenders, trial.error, trial.error_bound, trial.work, flashmoe_path="", floors={})

    bench = OperatorBench(name="", title="", rate=study.rate, standard=(), tiny=(), prepare=prepare)
    stopwatch, rows = Stopwatch(device), list[Row]()
    for case in cases:
        rows.append(bench.measure(case, stopwatch))
        out.write_text(json.dumps([row.model_dump() for row in rows]))


def main(order: dict[str, Any]) -> None:
    _, study = load(order["study"])
    folder, out, device = Path(order["folder"]), Path(order["out"]), torch.device(order["device"])
    known = {case.label: case for case in (*study.checks, *study.cases)}
    cases = [known[label] for label in order["cases"]]
    libraries = {
        name: Library(build.library(folder, name, order["watchdog"]), study, device) for name in order["variants"]
    }
    if order["limit"] is None:
        measure(study, libraries, cases, device, out)
    else:
        (library,) = libraries.values()
        out.write_text(check(study, library, cases, order["limit"], out).model_dump_json())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
