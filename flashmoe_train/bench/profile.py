"""The bench `profile_torchtitan`: where the time of a training step goes, of a recipe as stock and with our operators.

A recipe is trained for some steps, whose median is its step time; the last step is traced (`profile_worker`), and the
trace taken apart (`trace`). Rows hold, for both, the milliseconds of every kind of kernel and how much of them was
hidden behind computation, the time in which the device did nothing, how often the host waited, the heaviest kernels.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashmoe_train import launch
from flashmoe_train.bench import trace
from flashmoe_train.bench.measure import Bench
from flashmoe_train.bench.profile_worker import TRACE, UNTIMED, WALL
from flashmoe_train.bench.results import Row
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.bench.train import OUR_EXCHANGE, SELDOM, Case, TrainBench, empty_row, recipe_as_measured
from flashmoe_train.compare import CHOICES, WARMUP, Run
from flashmoe_train.recipe import write
from flashmoe_train.schema import Choice

STEPS = f"training.steps={WARMUP + 7 + UNTIMED}"
LOGGED_SELDOM = (f"training.steps={5 * (WARMUP + 3) + UNTIMED}", SELDOM)  # four readings of five steps each
MOST_KERNELS, WIDEST = 12, 72  # of each, in a table; characters of a name


class ProfileBench(TrainBench):
    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        row = empty_row(case, stopwatch.device.type)
        if row.skipped:
            return row
        profiles: dict[str, dict[str, Any]] = {}
        for choice in CHOICES:
            try:
                run, profiles[choice] = _traced(case, choice)
            except launch.RunError as error:
                row.failed[choice] = str(error)
                continue
            row.ms[choice] = run.step_ms
            row.tokens_per_s_per_gpu[choice] = run.tokens_per_s
            row.peak_gib[choice] = run.peak_gib
        return row.model_copy(update={"profile": profiles})

    def of_recipe(self, recipe: str) -> Case:
        return Case(recipe, launch.default_processes(), (STEPS,))

    def tables(self, row: Row) -> Iterator[tuple[str, list[list[str]]]]:
        profiles = (row.model_extra or {}).get("profile") or {}
        if profiles:
            yield f"{row.label}: where a step goes, in ms (of it hidden behind computation)", _steps(row, profiles)
            yield f"{row.label}: heaviest kernels", _kernels(profiles)


def _traced(case: Case, choice: Choice) -> tuple[Run, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_as_measured(case, choice, folder)
        path = Path(folder) / "recipe.toml"
        write(recipe, path)
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.gpus}"]
        launch.run([*torchrun, "-m", "flashmoe_train.bench.profile_worker", str(path)], show=False)
        summary = json.loads((Path(folder) / "summary.json").read_text())
        assert recipe.training.steps is not None  # every case says it
        timed = recipe.training.steps - UNTIMED
        summary["steps"] = [step for step in summary["steps"] if step["step"] <= timed]
        found = trace.summarise(Path(folder) / TRACE)
        found["traced_ms"] = json.loads((Path(folder) / WALL).read_text())["ms"]
        return Run.of(summary), found


def _steps(row: Row, profiles: dict[str, Any]) -> list[list[str]]:
    """A line for every part; the times that are not hidden and the idle time add up to the traced step."""
    lines = [["", *profiles]]
    for part in trace.PARTS:
        cells = [_part(profile["parts"].get(part)) for profile in profiles.values()]
        if any(cells):
            lines.append([part, *(cell or "–" for cell in cells)])
    idle = (profile["traced_ms"] - profile["busy_ms"] for profile in profiles.values())
    lines.append(["nothing at work", *(f"{ms:.1f}" for ms in idle)])
    lines.append(["traced step", *(f"{profile['traced_ms']:.1f}" for profile in profiles.values())])
    lines.append(["other steps, median", *(f"{row.ms[choice]:.1f}" for choice in profiles)])
    lines.append(["tokens/s per device", *(f"{row.tokens_per_s_per_gpu[choice]:,.0f}" for choice in profiles)])
    if any(row.peak_gib.values()):  # CPUs have none
        lines.append(["peak memory, GiB", *(f"{row.peak_gib[choice]:.1f}" for choice in profiles)])
    launches = (sum(part["launches"] for part in profile["parts"].values()) for profile in profiles.values())
    lines.append(["kernels, copies and fills launched", *(f"{count:,.0f}" for count in launches)])
    for wait in trace.WAITS:
        counts = [profile["waits"].get(wait, 0) for profile in profiles.values()]
        if any(counts):
            lines.append([wait, *(f"{count:,}" for count in counts)])
    return lines


def _part(part: dict[str, float] | None) -> str:
    if part is None:
        return ""
    return f"{part['ms']:.1f}" + (f" ({part['hidden']:.1f})" if part["hidden"] >= 0.05 else "")


def _kernels(profiles: dict[str, Any]) -> list[list[str]]:
    lines = [["kernel", "of", "part", "launches", "ms"]]
    for choice, profile in profiles.items():
        for kernel in profile["kernels"][:MOST_KERNELS]:
            launches, ms = f"{kernel['launches']:,}", f"{kernel['ms']:.1f}"
            # Quoted, or Markdown would take <T> for HTML.
            name = kernel["name"] if len(kernel["name"]) <= WIDEST else f"{kernel['name'][:WIDEST]}…"
            lines.append([f"`{name}`", choice, kernel["part"], launches, ms])
    return lines


_SMALL = ("training.steps=3", "training.seq_len=32", "training.validate_steps=1", "model.num_hidden_layers=1")

BENCHES: tuple[Bench, ...] = (
    ProfileBench(
        name="profile_torchtitan",
        title="A training step under TorchTitan",
        rate="tokens_per_s_per_gpu",
        standard=[
            # On two GPUs the recipes for four, with half of the layers where the memory is that of the parameters.
            Case("deepseek_v3_16b_4gpu", 2, ("model.num_hidden_layers=13", OUR_EXCHANGE, *LOGGED_SELDOM)),
            Case("qwen3_30b_24layers_4gpu", 2, ("model.num_hidden_layers=12", OUR_EXCHANGE, *LOGGED_SELDOM)),
            Case("llama3_8b_4gpu", 2, LOGGED_SELDOM),
            Case("deepseek_v3_16b_4gpu", 4, (OUR_EXCHANGE, *LOGGED_SELDOM)),
            Case("qwen3_30b_24layers_4gpu", 4, (OUR_EXCHANGE, *LOGGED_SELDOM)),
            Case("llama3_8b_4gpu", 4, LOGGED_SELDOM),
        ],
        tiny=[Case("qwen3_moe_debug", min(2, launch.default_processes()), _SMALL)],
    ),
)
