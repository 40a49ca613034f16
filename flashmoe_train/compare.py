"""`flashmoe compare`: trains a recipe as stock and with our operators from the same weights, side by side."""

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from flashmoe_train import integrations, launch
from flashmoe_train.errors import UsageError
from flashmoe_train.recipe import with_swap
from flashmoe_train.schema import Choice, Recipe

CHOICES: tuple[Choice, Choice] = ("stock", "flashmoe")
WARMUP = 5  # steps that compile, allocate and fill caches, and are not timed


@dataclass(frozen=True)
class Run:
    """What counts of one run, from its summary.json."""

    losses: list[float]
    heldout: float | None
    step_ms: float  # median
    tokens_per_s: float  # per device, median
    peak_gib: float  # per device

    @classmethod
    def of(cls, summary: dict[str, Any]) -> "Run":
        steps = summary["steps"]
        timed = steps[WARMUP:] or steps
        return cls(
            losses=[step["loss"] for step in steps],
            heldout=summary["heldout"][-1]["loss"] if summary["heldout"] else None,
            step_ms=median(step["seconds"] for step in timed) * 1e3,
            tokens_per_s=median(step["tokens_per_s"] for step in timed),
            peak_gib=summary["peak_gib_per_device"],
        )


def compare(recipe: Recipe, processes: int, allow_fallback: bool, console: Console) -> float:
    """Trains both, prints and draws the comparison; returns the largest difference of a step's loss, or NaN if a loss
    is not finite.

    Raises UsageError if one of the two could not be trained, before it trains the other, and launch.RunError if a run
    fails; it has said why on the screen.
    """
    if with_swap(recipe, "stock", "").swap == recipe.swap:
        raise UsageError("the recipe swaps nothing: there is nothing to compare")
    folder = Path(str(recipe.folder)) / "compare"
    recipes, explain = (integrations.part(recipe.framework, name) for name in ("recipes", "explain"))
    for choice in CHOICES:
        explain.explain(with_swap(recipe, choice, str(folder / choice)), processes)
    weights = recipes.weights_of(recipe)
    if weights is None and (seeding := recipes.seed(recipe, str(folder / "seed"))) is not None:
        console.print("writing the weights that both start from")
        seed, weights = seeding
        launch.train(seed, 1, allow_fallback=True, show=True)
    runs: dict[str, Run] = {}
    for choice in CHOICES:
        console.rule(choice)
        starting = recipes.starting_from(with_swap(recipe, choice, str(folder / choice)), weights)
        runs[choice] = Run.of(launch.train(starting, processes, allow_fallback=allow_fallback, show=True))
    console.rule("stock and flashmoe")
    differences = [abs(a - b) for a, b in zip(*(runs[choice].losses for choice in CHOICES), strict=True)]
    worst = next((i for i, d in enumerate(differences) if not isfinite(d)), differences.index(max(differences)))
    curve = draw({choice: run.losses for choice, run in runs.items()}, folder / "compare.png")
    written = folder / "compare.json"
    mean = fmean(differences)
    found = {"mean_difference": mean, "largest_difference": differences[worst]}
    content = found | {choice: vars(run) for choice, run in runs.items()}
    written.write_text(json.dumps(content, indent=1) + "\n")
    console.print(_table(runs))
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "losses differ by",
        f"{mean:.1e} in the mean; at most {differences[worst]:.1e}, of logged step {worst + 1} of {len(differences)}",
    )
    facts.add_row("curves", str(curve))
    facts.add_row("numbers", str(written))
    console.print(facts, highlight=False)
    return differences[worst]


def _table(runs: dict[str, Run]) -> Table:
    table = Table()
    for heading in ("", *CHOICES, "flashmoe / stock"):
        table.add_column(heading, justify="right" if heading else "left")
    stock, ours = (runs[choice] for choice in CHOICES)
    table.add_row("first loss", f"{stock.losses[0]:.4f}", f"{ours.losses[0]:.4f}", "")
    table.add_row("last loss", f"{stock.losses[-1]:.4f}", f"{ours.losses[-1]:.4f}", "")
    if stock.heldout is not None and ours.heldout is not None:
        table.add_row("held-out loss", f"{stock.heldout:.4f}", f"{ours.heldout:.4f}", "")
    for name, a, b in (
        ("ms per step", stock.step_ms, ours.step_ms),
        ("tokens/s per device", stock.tokens_per_s, ours.tokens_per_s),
        ("peak memory per device, GiB", stock.peak_gib, ours.peak_gib),
    ):
        if a > 0 and b > 0:  # CPUs have no peak
            table.add_row(name, f"{a:,.1f}", f"{b:,.1f}", f"{b / a:.2f}")
    return table


def draw(losses: dict[str, list[float]], path: Path) -> Path:
    """Curves, and below them how far the others are from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    first = next(iter(losses.values()))
    steps = range(1, len(first) + 1)
    for i, (name, own) in enumerate(losses.items()):
        above.plot(steps, own, ("-", "--", ":")[i % 3], color=f"C{i}", label=name)
        if own is not first:  # 0 has no logarithm
            differences = [max(abs(a - b), 1e-9) for a, b in zip(first, own, strict=True)]
            below.semilogy(steps, differences, color=f"C{i}", linewidth=1)
    above.set(ylabel="loss (nats per token)")
    above.legend()
    below.set(xlabel="logged step", ylabel="difference")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
