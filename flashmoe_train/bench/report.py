"""What a person sees of a bench: a table in the terminal, a plot on request."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashmoe_train.bench.measure import Bench
from flashmoe_train.bench.results import EVERYBODY, FLOORS, OURS, Results, Row, geometric_mean
from flashmoe_train.errors import UsageError

FAILED, NOTHING = "FAILED", "–"
STYLES = {FAILED: "bold red", NOTHING: "dim"}
_UNITS = {"tflops": "TFLOP/s", "gb_per_s": "GB/s", "tokens_per_s_per_gpu": "tokens/s per device"}


def implementations(rows: Sequence[Row]) -> list[str]:
    """Everything that ran or might have, ours first, floors last."""
    found = dict.fromkeys(name for row in rows for names in (row.ms, row.failed, row.skipped) for name in names)
    names = [name for name in found if name not in (OURS, EVERYBODY, *FLOORS)]
    return [OURS, *names, *(name for name in FLOORS if name in found)]


def grid(bench: Bench, rows: Sequence[Row]) -> list[list[str]]:
    """The table of `rows` as text, headings first: each implementation's time and rate, our ratios."""
    names = implementations(rows)
    floors = [name for name in names if name in FLOORS]
    factor = f"{bench.floor_factor:g}·" if bench.floor_factor != 1 else ""
    lines = [["case", *names, "× best baseline", *(f"{factor}{floor}/ours" for floor in floors)]]
    for row in rows:
        ratio = row.ratio()
        cells = [_cell(row, name, bench) for name in names]
        cells.append(f"{ratio[1]:.2f} {ratio[0]}" if ratio else NOTHING)
        for floor in floors:
            both = OURS in row.ms and floor in row.ms
            cells.append(f"{bench.floor_factor * row.ms[floor] / row.ms[OURS]:.2f}" if both else NOTHING)
        lines.append([row.label, *cells])
    return lines


def unit(bench: Bench) -> str:
    """Of the cells of `grid`."""
    return f"{'µs' if bench.in_microseconds else 'ms'} ({_UNITS[bench.rate]})"


def show(console: Console, bench: Bench, results: Results) -> None:
    """The table; below it what was not run, and how we compare with each baseline in the mean."""
    heading, *lines = grid(bench, results.rows)
    _print(console, f"{bench.title}: {unit(bench)}, {results.gpu}, torch {results.torch}", heading, lines)
    for row in results.rows:
        for title, (heading, *lines) in bench.tables(row):
            _print(console, title, heading, lines)
    for note in _notes(bench, results):
        console.print(note, highlight=False, markup=False)


def _print(console: Console, title: str, heading: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, box=box.SIMPLE)
    table.add_column(heading[0])
    for name in heading[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in line))
    console.print(table)


def _cell(row: Row, name: str, bench: Bench) -> str:
    if name in row.failed:
        return FAILED
    if name not in row.ms:
        return NOTHING
    time = row.ms[name] * (1e3 if bench.in_microseconds else 1)
    shown = f"{time:.4g}" if time < 1e4 else f"{time:.0f}"
    rate = getattr(row, bench.rate).get(name)  # a floor may do without the work that is counted
    return shown if rate is None else f"{shown} ({_rounded(rate)})"


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _notes(bench: Bench, results: Results) -> list[str]:
    points = {case.label for case in bench.standard if bench.is_point(case)}
    counted = [row for row in results.rows if row.label in points] or results.rows
    lines = []
    for name in implementations(results.rows):
        ratios = {row.label: ratio[1] for row in counted if (ratio := row.ratio([name]))}
        if ratios and name not in (OURS, *FLOORS):
            lowest = min(ratios, key=ratios.__getitem__)
            lines.append(
                f"flashmoe is {geometric_mean(ratios.values()):.3f} × {name} "
                f"(geometric mean of {len(ratios)} cases; lowest {ratios[lowest]:.2f}: {lowest})"
            )
    memory = [row for row in results.rows if any(row.peak_gib.values())]
    for row in memory:
        lines.append(f"peak GiB: {row.label}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.peak_gib.items()))
    paths = {row.flashmoe_path for row in results.rows if row.flashmoe_path}
    if paths:
        lines.append(f"flashmoe ran: {', '.join(sorted(paths))}")
    errors = {name: max(row.error.get(name, 0.0) for row in results.rows) for name in implementations(results.rows)}
    if any(errors.values()):
        lines.append("largest error: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if error))
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        for name, reason in row.skipped.items():
            reasons.setdefault((name, reason), []).append(row.label)
    for (name, reason), labels in sorted(reasons.items()):
        where = f"; {', '.join(labels)}" if len(labels) < len(results.rows) else ""
        lines.append(f"not run: {'anything' if name == EVERYBODY else name}: {reason}{where}")
    for row in results.rows:
        lines += [f"FAILED: {row.label}: {name}: {reason}" for name, reason in row.failed.items()]
    return lines


def check_plotting() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None


def plot(bench: Bench, results: Results, path: Path) -> None:
    """Bars of throughput, a group a case; beside ours its ratio to the best baseline."""
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.ms]
    names = [name for name in implementations(rows) if any(name in row.ms for row in rows)]
    height = 0.8 / max(1, len(names))
    figure = Figure(figsize=(9, 1.2 + len(rows) * (0.16 * len(names) + 0.1)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        own = [(place, row) for place, row in enumerate(rows) if name in row.ms]
        places = [place - 0.4 + (i + 0.5) * height for place, _ in own]
        color = "lightgray" if name in FLOORS else "black" if name == OURS else None
        bars = axes.barh(
            places, [getattr(row, bench.rate).get(name, 0.0) for _, row in own], height, label=name, color=color
        )
        if name == OURS:
            ratios = [row.ratio() for _, row in own]
            axes.bar_label(bars, [f"{r[1]:.2f} × {r[0]}" if r else "" for r in ratios], padding=3, fontsize=7)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.18, y=0.02)
    axes.set_xlabel(_UNITS[bench.rate])
    axes.set_title(f"{bench.title} ({results.gpu}, torch {results.torch})", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(7, max(1, len(names))), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
