"""`flashmoe bench`: measures our operators beside what else is installed, every result checked before it is timed.

A subject is a line of `SUBJECTS`; `run` is the command behind its options.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from flashmoe_train.bench import attention, expert_parallel, moe, moe_parts, moe_transformers, profile, report, train
from flashmoe_train.bench.measure import Bench, Case
from flashmoe_train.bench.results import EVERYBODY, OURS, Results, Row, compare, gpu_name, here, read
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.errors import UsageError, nearest

SUBJECTS: dict[str, tuple[Bench, ...]] = {
    "attention": attention.BENCHES,
    "moe": (*moe.BENCHES, *moe_parts.BENCHES),
    "expert-parallel": expert_parallel.BENCHES,
    "transformers": moe_transformers.BENCHES,
    "train": train.BENCHES,
    "profile": profile.BENCHES,
}


@dataclass(frozen=True)
class Options:
    """Of the command; None is what was not given."""

    subject: str
    cases: str | None = None
    json: Path | None = None
    plot: Path | None = None
    against: Path | None = None
    tolerance: float = 0.05
    device: str | None = None

    def command(self) -> str:
        """What to type to get the same numbers; where they went is the machine's own."""
        words = ["flashmoe", "bench", self.subject]
        for name in ("cases", "device"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        return shlex.join(words)


def by_name() -> dict[str, Bench]:
    """Every bench of every subject."""
    return {bench.name: bench for benches in SUBJECTS.values() for bench in benches}


def run(options: Options, console: Console | None = None) -> int:
    """Measures; returns the exit code: 1 if a result was wrong or, with `against`, worse than the stored one.

    Raises UsageError for what cannot be done, before anything is measured.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = 200  # a log has no margins
    device = _device(options.device)
    selected = select(_benches(options.subject), options.cases or ("standard" if device.type == "cuda" else "tiny"))
    benches = [bench for bench, _ in selected]
    names = [bench.name for bench in benches]
    json_paths = paths(options.json, "--json", ".json", names)
    plot_paths = paths(options.plot, "--plot", ".png", names)
    if options.plot:
        report.check_plotting()
    stored = _stored(options.against, benches, gpu_name(device))
    _check_comparable(selected, stored, options.against)
    for name, results in stored.items():
        if results.gpu != gpu_name(device):
            console.print(f"{name} is compared with results of another GPU, {results.gpu}", highlight=False)
    stopwatch = Stopwatch(device)
    finished, worse, compared = [], list[str](), 0
    for bench, cases in selected:
        results = _measure(bench, cases, stopwatch, here(bench.name, options.command(), device), json_paths, console)
        finished.append(results)
        report.show(console, bench, results)
        if bench.name in plot_paths:
            report.plot(bench, results, plot_paths[bench.name])
        if bench.name in stored:
            count, reasons = compare(results, stored[bench.name], options.tolerance)
            compared, worse = compared + count, worse + reasons
    wrong = any(row.failed for results in finished for row in results.rows)
    if options.against:
        if not compared:
            raise UsageError(f"nothing in {options.against} could be compared: no case and baseline is in both")
        for reason in worse:
            console.print(f"WORSE: {reason}", highlight=False, markup=False)
        console.print(f"{compared} cases compared with {options.against}, {len(worse)} worse", highlight=False)
    return 1 if wrong or worse else 0


def _measure(
    bench: Bench,
    cases: Sequence[Case],
    stopwatch: Stopwatch,
    results: Results,
    paths: dict[str, Path],
    console: Console,
) -> Results:
    for number, case in enumerate(cases, 1):
        title = f"{bench.name} {number}/{len(cases)}: {case.label}"
        with console.status(title):
            row = bench.measure(case, stopwatch)
        results.rows.append(row)
        if not console.is_terminal:
            ratio = row.ratio()
            whys = (why.get(name) for why in (row.failed, row.skipped) for name in (OURS, EVERYBODY))
            found = f"{row.ms[OURS]:.4g} ms" if OURS in row.ms else next(filter(None, whys), "not run")
            beside = f", {ratio[1]:.2f} × {ratio[0]}" if ratio else ""
            console.print(f"{title}: {found}{beside}", highlight=False, markup=False)
        if bench.name in paths:
            results.write(paths[bench.name])  # every time: a run that is cut short leaves what it has
    return results


def _benches(subject: str) -> tuple[Bench, ...]:
    if subject in SUBJECTS:
        return SUBJECTS[subject]
    known = by_name()
    wanted = subject.replace("-", "_")
    if wanted in known:
        return (known[wanted],)
    raise UsageError(f"no bench is called {subject!r}; {nearest(wanted, [*SUBJECTS, *known], 'there are ')}")


def select(benches: Sequence[Bench], cases: str) -> list[tuple[Bench, Sequence[Case]]]:
    """Of each bench the cases that `cases` means, where there are any: standard, tiny, or a pattern of labels."""
    if cases in ("standard", "tiny"):
        return [(bench, bench.standard if cases == "standard" else bench.tiny) for bench in benches]
    found = [(bench, bench.matching(cases)) for bench in benches]
    if not any(matching for _, matching in found):
        labels = dict.fromkeys(case.label for bench in benches for case in bench.standard)
        raise UsageError(f"no case matches {cases!r}; there are standard, tiny, and:\n  " + "\n  ".join(labels))
    return [(bench, matching) for bench, matching in found if matching]


def _check_comparable(
    selected: Sequence[tuple[Bench, Sequence[Case]]], stored: dict[str, Results], path: Path | None
) -> None:
    """Raises UsageError if none of the cases is stored: before they are measured, not after."""
    known = {(name, row.key) for name, results in stored.items() for row in results.rows}
    wanted = {(bench.name, Row(case=case.as_json()).key) for bench, cases in selected for case in cases}
    if path and not known & wanted:
        raise UsageError(f"nothing in {path} could be compared: it holds none of these cases")


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"--device must be cuda or cpu, found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def paths(path: Path | None, option: str, suffix: str, names: Sequence[str]) -> dict[str, Path]:
    """Where each bench's results go: `path` is a folder, or for one bench a file."""
    if path is None:
        return {}
    if path.suffix == suffix:
        if len(names) > 1:
            several = f"{len(names)} benches ({', '.join(names)})"
            raise UsageError(f"{option} {path} is one file for {several}: name a folder")
        return {names[0]: path}
    if path.suffix or path.is_file():
        raise UsageError(f"{option} must be a folder or end in {suffix}, found {path}")
    return {name: path / f"{name}{suffix}" for name in names}


def _stored(path: Path | None, benches: Sequence[Bench], gpu: str) -> dict[str, Results]:
    """Stored results by bench: of a file, or of a folder's files; of several machines' folders this machine's."""
    if path is None:
        return {}
    names = [bench.name for bench in benches]
    if not path.is_dir():
        results = read(path)
        if results.bench not in names:
            raise UsageError(f"{path} holds results of {results.bench}, which this run does not measure")
        return {results.bench: results}
    stored: dict[str, Results] = {}
    for name in names:
        found = {file: read(file) for file in sorted(path.rglob(f"{name}.json"))}
        same = [results for results in found.values() if results.gpu == gpu] or [*found.values()]
        if len(same) > 1:
            raise UsageError(f"which of these is to be compared with? {', '.join(map(str, found))}")
        stored.update((name, results) for results in same)
    if not stored:
        raise UsageError(f"{path} holds none of {', '.join(f'{name}.json' for name in names)}")
    return stored
