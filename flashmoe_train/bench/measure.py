"""What the benches of operators share: a case, the check against float64 that comes before any timing, a row."""

import gc
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from flashmoe_train.bench.results import EVERYBODY, OURS, OURS_TOO, Row
from flashmoe_train.bench.timing import Run, Stopwatch

# Relative error, in the Frobenius norm, of a result that was rounded a few times on the way: as the tests ask.
ERROR_BOUND = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


R = TypeVar("R")


class Unavailable(Exception):
    """An implementation is not installed or does not take a case; the text says which."""


Contender = Callable[[], Run]  # sets an implementation up and returns what is checked and timed; may raise Unavailable


@dataclass(frozen=True)
class Problem:
    """A case whose inputs are on the device."""

    contenders: Mapping[str, Contender]
    error: Callable[[Any], float]  # of what a contender's run returns, against float64
    error_bound: float
    work: float  # FLOPs or bytes of one run, whoever does it
    flashmoe_path: str
    floors: Mapping[str, Contender]  # timed beside the contenders; they compute something else


class Case(Protocol):
    @property
    def label(self) -> str: ...
    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One bench: its cases, and how one of them becomes a row."""

    name: str
    title: str
    rate: Literal["tflops", "gb_per_s", "tokens_per_s_per_gpu"]
    standard: Sequence[Case]
    tiny: Sequence[Case]
    floor_factor: float = 1.0  # the floor is for a part of the work: forward GEMMs under forward and backward
    in_microseconds: bool = False  # what a person sees; the stored results are in milliseconds
    is_point: Callable[[Any], bool] = lambda case: True  # counts in the geometric mean

    def matching(self, pattern: str) -> Sequence[Case]:
        """The standard cases whose labels match a glob."""
        return [case for case in self.standard if fnmatchcase(case.label.lower(), pattern.lower())]

    def measure(self, case: Any, stopwatch: Stopwatch) -> Row:
        raise NotImplementedError

    def tables(self, row: Row) -> Iterable[tuple[str, list[list[str]]]]:
        """What else a row has to show: titles and tables, headings first."""
        return ()


@dataclass(frozen=True, kw_only=True)
class OperatorBench(Bench):
    """One bench of operators, in this process. `prepare` makes a case's inputs and its reference."""

    prepare: Callable[[Any, torch.device], Problem]
    measures_memory: bool = False

    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        """A row, whatever happens: what does not fit or does not run is said in it."""
        row = Row(case=case.as_json(), label=case.label)
        try:
            _fill(self, case, stopwatch, row)
        except (torch.OutOfMemoryError, Unavailable) as error:
            row.skipped[EVERYBODY] = reason(error)  # its inputs, its reference or all of it at once
        free()
        return row


def free() -> None:
    """Gives the memory of the last case back, so that the next finds it in one piece."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _fill(bench: OperatorBench, case: Case, stopwatch: Stopwatch, row: Row) -> None:
    problem = bench.prepare(case, stopwatch.device)
    row.flashmoe_path = problem.flashmoe_path
    runs: dict[str, Run] = {}
    for name, contender in problem.contenders.items():
        run = _checked(name, contender, problem, row)
        free()
        if run is None:
            continue
        runs[name] = run
        if bench.measures_memory and stopwatch.device.type == "cuda":
            row.peak_gib[name] = stopwatch.peak_gib(run)
    runs.update((name, run) for name, floor in problem.floors.items() if (run := _guarded(name, floor, row)))
    # A rehearsal with all inputs in place: who breaks down is left out before the others are timed.
    row.ms = stopwatch.medians({name: run for name, run in runs.items() if _guarded(name, partial(_call, run), row)})
    if OURS in row.skipped and row.ms:  # what others have the memory for
        row.failed[OURS] = row.skipped.pop(OURS)
    scale = {"tflops": 1e9, "gb_per_s": 1e6}[bench.rate]  # of FLOPs or bytes per millisecond
    rates = row.tflops if bench.rate == "tflops" else row.gb_per_s
    for name, ms in row.ms.items():
        part = bench.floor_factor if name in problem.floors else 1.0  # a floor's own work may be a part of the row's
        rates[name] = problem.work / part / ms / scale


def _checked(name: str, contender: Contender, problem: Problem, row: Row) -> Run | None:
    """The run of a contender that is right; otherwise the row says why there is none."""

    def check() -> tuple[Run, float]:
        run = contender()
        return run, problem.error(run())

    checked = _guarded(name, check, row)
    if checked is None:
        return None
    run, error = checked
    return run if accept(name, error, problem.error_bound, row) else None


def accept(name: str, error: float, bound: float, row: Row) -> bool:
    """Whether a result is right; the row says how far off it is."""
    if math.isfinite(error):
        row.error[name] = error
    if error <= bound:
        return True
    row.failed[name] = f"relative error {error:.1e}, allowed {bound:.0e}"
    return False


def _guarded(name: str, action: Callable[[], R], row: Row) -> R | None:
    """What `action` returns, or nothing, and the row says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend refuses comes as an exception too
            return action()
    except (Unavailable, torch.OutOfMemoryError) as error:
        row.skipped[name] = reason(error)
    except Exception as error:
        # A baseline that refuses a case is absent; we may not refuse one.
        (row.failed if name in (OURS, *OURS_TOO) else row.skipped)[name] = reason(error)
        row.error.pop(name, None)
    free()
    return None


def _call(run: Run) -> bool:
    run()
    return True


def reason(error: Exception) -> str:
    """Why something was not run, in a line."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {str(error).split('. GPU')[0]}"
    sentence = re.split(r"\n|[.] ", str(error))[0]
    return f"{type(error).__name__}: {sentence[:160]}"


def path(unsupported: str | None, device_type: str) -> str:
    """What our public functions run, by what `supports` says: kernel, fallback or reference."""
    if unsupported is not None:
        return "fallback"
    return "kernel" if device_type == "cuda" else "reference"


def compiled(function: Callable[..., R], device: torch.device) -> Callable[..., R]:
    """A baseline under torch.compile, anew for every case. Raises Unavailable on CPUs."""
    if device.type == "cpu":
        raise Unavailable("on GPUs only: here it would mostly measure the compiler")
    torch._dynamo.reset()  # or it would generalise over the shapes it has seen
    return torch.compile(function, dynamic=False)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in the Frobenius norm; NaN if anything is, infinite if the shape is another."""
    if found.shape != wanted.shape:
        return math.inf
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if any is, which `max` would lose."""
    values = list(errors)
    return math.nan if any(map(math.isnan, values)) else max(values)
