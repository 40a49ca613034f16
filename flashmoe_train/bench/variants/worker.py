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
from flashmoe_train.bench.timing import Run, Stopwatch
from flashmoe_train.bench.variants import Study, Trial, build, load
from flashmoe_train.bench.variants.library import Hang, Library


class Verdict(BaseModel):
    """On one variant."""

    case: str = ""  # where it went wrong, or is
    problem: str = "its process ended there"  # empty: all cases are right
    hung: bool = False
    hangs: list[Hang] = []  # of the watchdog


class Timing(BaseModel):
    """Of several variants."""

    rows: list[Row] = []  # of the first cases
    lost: str = ""  # a variant that did not get through the next case
    problem: str = ""  # with it


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
                    synchronize(library.device)
                error = trial.error(result)
                poison(result)
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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def poison(result: Any) -> None:
    """NaN into every tensor of a result: the next run must write it all again."""
    for x in (result,) if isinstance(result, torch.Tensor) else result:
        x.fill_(float("nan"))


def measure(
    study: Study,
    libraries: dict[str, Library],
    cases: list[Case],
    device: torch.device,
    limit: float,
    out: Path,
) -> None:
    """Writes a row for every case: the variants and the baselines in turns, each checked before it is timed. A variant
    whose first launch hangs or fails ends the process, since it may have broken the device for all."""
    timing = Timing()

    def lose(name: str, problem: str) -> None:
        timing.lost, timing.problem = name, problem
        out.write_text(timing.model_dump_json())
        os._exit(1)

    def contender(name: str, trial: Trial) -> Run:
        run = trial.run(libraries[name].launch)
        watched = True

        def once() -> Any:
            nonlocal watched
            if not watched:
                return run()
            watched = False
            try:
                with deadline(limit, partial(lose, name, f"no end after {limit:g} s")):
                    result = run()
                    synchronize(device)
            except RuntimeError as failure:
                lose(name, reason(failure))
            return result

        return once

    def prepare(case: Any, device: torch.device) -> Problem:
        trial = study.prepare(case, device)
        variants: dict[str, Contender] = {name: partial(contender, name, trial) for name in libraries}
        contenders = {**variants, **trial.baselines}
        return Problem(contenders, trial.error, trial.error_bound, trial.work, flashmoe_path="", floors={})

    bench = OperatorBench(name="", title="", rate=study.rate, standard=(), tiny=(), prepare=prepare)
    stopwatch = Stopwatch(device)
    for case in cases:
        timing.rows.append(bench.measure(case, stopwatch))
        out.write_text(timing.model_dump_json())


def main(order: dict[str, Any]) -> None:
    _, study = load(order["study"])
    folder, out, device = Path(order["folder"]), Path(order["out"]), torch.device(order["device"])
    known = {case.label: case for case in (*study.checks, *study.cases)}
    cases = [known[label] for label in order["cases"]]
    libraries = {
        name: Library(build.library(folder, name, order["watchdog"]), study, device) for name in order["variants"]
    }
    if order["timed"]:
        measure(study, libraries, cases, device, order["limit"], out)
    else:
        (library,) = libraries.values()
        out.write_text(check(study, library, cases, order["limit"], out).model_dump_json())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # its word is written; threads that still run while an interpreter is torn down may abort it
