"""How busy our kernels keep the parts of a GPU: `python -m flashmoe_train.bench.utilisation attention_forward`.

Nsight Compute watches a process of this module that runs a case of a bench once, with our implementation alone; every
kernel launched there is a row. The counters need several passes: a kernel is launched again for each, from the same
memory and with cold caches, so that the times are near those of the bench but not for quoting.
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from flashmoe_train.bench import by_name, paths, select
from flashmoe_train.bench.kernel_names import short_name
from flashmoe_train.bench.measure import Case, OperatorBench, free
from flashmoe_train.bench.report import NOTHING
from flashmoe_train.bench.results import OURS, Results, Row, here
from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.train import usage_errors

PREFIX = "utilisation_"  # of the results' name; the bench's follows
UNIT = (
    "tensor cores to warps: % of peak, special functions, issue slots and warps of the time in which a multiprocessor "
    "has work, the others of the whole time; registers a thread; threads and KiB of shared memory a block; fit: blocks "
    "for which a multiprocessor has registers, or shared memory"
)
_MODULE = "flashmoe_train.bench.utilisation"  # not __name__, which is __main__ where this is run
_LIMIT = 600  # seconds for one case: Python starts, inputs and their reference are made
_WARM_UP = 3

_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
_GIGAHERTZ = {"hz": 1e-9, "khz": 1e-6, "mhz": 1e-3, "ghz": 1, "cycle/second": 1e-9, "cycle/nsecond": 1}
_KIB = {"byte/block": 1 / 1024, "kbyte/block": 1000 / 1024}


@dataclass(frozen=True)
class Metric:
    key: str  # in the results
    heading: str
    name: str  # Nsight Compute's
    units: Mapping[str, float] = field(default_factory=dict)  # how many of ours is one of ncu's; none: it has one only

    def read(self, text: str, unit: str) -> float | None:
        """None where the GPU has no such counter."""
        try:
            number = float(text.replace(",", ""))
        except ValueError:
            return None
        if self.units:
            if unit.lower() not in self.units:
                raise UsageError(f"ncu says {self.name} in {unit!r}; known are {', '.join(self.units)}")
            number *= self.units[unit.lower()]
        return int(number) if number.is_integer() else number


METRICS = (
    Metric("us", "µs", "gpu__time_duration.sum", _MICROSECONDS),
    Metric("ghz", "GHz", "sm__cycles_elapsed.avg.per_second", _GIGAHERTZ),
    Metric("tensor", "tensor cores", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"),
    Metric("special", "special functions", "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active"),
    Metric("issue", "issue slots", "sm__inst_issued.avg.pct_of_peak_sustained_active"),
    Metric("l1", "L1 and shared", "l1tex__throughput.avg.pct_of_peak_sustained_elapsed"),
    Metric("l2", "L2", "lts__throughput.avg.pct_of_peak_sustained_elapsed"),
    Metric("memory", "memory", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    Metric("warps", "warps", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    Metric("registers", "registers", "launch__registers_per_thread"),
    Metric("threads", "threads", "launch__block_size"),
    Metric("shared_kib", "shared KiB", "launch__shared_mem_per_block_dynamic", _KIB),
    Metric("blocks", "blocks", "launch__grid_size"),
    Metric("fit_registers", "fit by registers", "launch__occupancy_limit_registers"),
    Metric("fit_shared", "fit by shared", "launch__occupancy_limit_shared_mem"),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """The table of `rows`, headings first."""
    lines = [["case", "kernel", *(metric.heading for metric in METRICS)]]
    for row in rows:
        extra = row.model_extra or {}
        values = (extra["values"].get(metric.key) for metric in METRICS)
        cells = (NOTHING if x is None else f"{x:.0f}" if x >= 1000 else f"{x:.3g}" for x in values)
        lines.append([row.label, extra["kernel"], *cells])
    return lines


# --------------------------------------------------------------------------------------------------- what ncu prints


def kernels(output: str) -> list[tuple[str, dict[str, float]]]:
    """(short name, values by key) of each launch, in the order of launches, of what `ncu --csv` prints."""
    lines = [line for line in output.splitlines() if line.startswith('"')]  # the others are progress and warnings
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for line in csv.DictReader(lines):
        _, values = found.setdefault(line["ID"], (short_name(line["Kernel Name"]), {}))
        metric = _BY_NAME.get(line["Metric Name"])
        if metric and (value := metric.read(line["Metric Value"], line["Metric Unit"])) is not None:
            values[metric.key] = value
    return [*found.values()]


# ----------------------------------------------------------------------------------------------------------- processes


def profile(ncu: str, bench: OperatorBench, case: Case) -> list[Row]:
    """A row for each kernel of the case. Raises UsageError where Nsight Compute can't measure it."""
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--metrics", ",".join(_BY_NAME), sys.executable, "-m", _MODULE, bench.name, "--watched", case.label]
    measured = kernels(_output(command))
    if not measured:
        raise UsageError(f"ncu saw no kernel of {bench.name}: {case.label}")
    about = {"case": case.as_json(), "label": case.label}
    return [Row.model_validate(about | {"kernel": name, "values": values}) for name, values in measured]


def _output(command: Sequence[str]) -> str:
    try:
        # In some languages ncu's numbers have commas for points.
        environment = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        raise UsageError(f"no end after {_LIMIT} s: {shlex.join(command)}") from None
    text = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in text:
        raise UsageError(
            "the driver lets administrators alone read this GPU's counters: run as root (in a container, with the "
            "capability SYS_ADMIN), or load the module nvidia with NVreg_RestrictProfilingToAdminUsers=0; see "
            "https://developer.nvidia.com/ERR_NVGPUCTRPERM"
        )
    if done.returncode:
        raise UsageError(f"{shlex.join(command)} ended with {done.returncode}: {text[-800:].strip()}")
    return done.stdout


def _run_watched(bench: OperatorBench, label: str) -> None:
    """In the process that Nsight Compute watches: our run of a case, checked and warmed up before it is measured."""
    case = next(case for case in (*bench.standard, *bench.tiny) if case.label == label)
    problem = bench.prepare(case, torch.device("cuda"))
    run = problem.contenders[OURS]()
    error = problem.error(run())
    if not error <= problem.error_bound:
        raise UsageError(f"{label}: relative error {error:.1e}, allowed {problem.error_bound:.0e}")
    del problem
    free()
    for _ in range(_WARM_UP):
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _ncu() -> str:
    found = shutil.which("ncu")
    if found is None:
        raise UsageError(
            "ncu is not on the PATH: install Nsight Compute, or add its folder; with the CUDA toolkit it came to "
            "/usr/local/cuda/bin"
        )
    return found


# ------------------------------------------------------------------------------------------------------------- command


def _bench(name: str) -> OperatorBench:
    benches = {found.name: found for found in by_name().values() if isinstance(found, OperatorBench)}
    name = name.replace("-", "_")
    if name not in benches:
        raise UsageError(f"no bench of operators is called {name!r}; {nearest(name, [*benches], 'there are ')}")
    return benches[name]


def measure(bench: OperatorBench, cases: str | None, json: Path | None, console: Console) -> Results:
    """Raises UsageError where there is no GPU, no ncu or no permission."""
    ((_, selected),) = select([bench], cases or "standard")
    name = PREFIX + bench.name
    path = paths(json, "--json", ".json", [name]).get(name)
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU here")
    ncu = _ncu()
    command = ["python", "-m", _MODULE, bench.name, *(["--cases", cases] if cases else [])]
    results = here(name, shlex.join(command), torch.device("cuda"))
    if version := re.search(r"Version (\S+)", _output([ncu, "--version"])):
        results.versions["ncu"] = version[1]
    for number, case in enumerate(selected, 1):
        with console.status(f"{bench.name} {number}/{len(selected)}: {case.label}"):
            results.rows += profile(ncu, bench, case)
        if path:
            results.write(path)  # every time: a run that is cut short leaves what it has
    return results


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bench: Annotated[str, typer.Argument(help="A bench of operators, such as attention_forward.")],
    cases: Annotated[str | None, typer.Option(help="standard, tiny, or a pattern of case labels.")] = None,
    json: Annotated[Path | None, typer.Option(help="A folder or a file for the results.")] = None,
    watched: Annotated[str | None, typer.Option(hidden=True, help="The case to run under Nsight Compute.")] = None,
) -> None:
    """Shows how busy our kernels keep the GPU in the cases of a bench; needs Nsight Compute."""
    with usage_errors():
        chosen = _bench(bench)
        if watched is not None:
            _run_watched(chosen, watched)
            return
        console = Console()
        if not console.is_terminal:
            console.width = 200
        results = measure(chosen, cases, json, console)
    heading, *lines = grid(results.rows)
    table = Table(title=f"{chosen.title}: {results.gpu}, torch {results.torch}", box=box.SIMPLE, padding=0)
    for name in heading[:2]:
        table.add_column(name, overflow="fold")  # where it gets narrow, names give way
    for name in heading[2:]:
        table.add_column(name, justify="right", overflow="fold", min_width=5, max_width=9)
    for line in lines:
        table.add_row(*line)
    console.print(table, highlight=False, markup=False)
    console.print(UNIT, highlight=False, markup=False)


if __name__ == "__main__":
    app()
