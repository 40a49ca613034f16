"""What a person sees of a training run, whichever framework runs it: progress bar, loss curve, summary.

One process of a run has a Monitor. It leaves `loss.png` and `summary.json` in the run's folder, and `history.jsonl`, to
which every step is added as it is logged: a run that was killed has that alone, and goes on with it when it is resumed.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flashmoe_train.resources import replace_file
from flashmoe_train.swap import Report


@dataclass(frozen=True)
class Step:
    """One logged training step."""

    step: int
    loss: float  # nats per token, mean over all processes
    grad_norm: float
    tokens_per_s: float  # per device
    seconds: float = 0.0  # wall time, mean of the steps since the last logged one
    peak_gib: float = 0.0  # most memory in use on a device during those; 0 on CPUs
    expert_load: float | None = None  # of the busiest expert, in means; None for models without experts
    dropped_rows: int | None = None  # slots (a token, one of its experts) that no expert computed


class Skipped(Protocol):
    """What an exchange had no room for."""

    skipped_steps: int
    lost_rows: int


@dataclass
class History:
    steps: list[Step] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)


def _read(path: Path, before: int) -> History:
    """What such a file holds of the steps before that one."""
    found = History()
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill has cut off, a file not ours
            line = json.loads(text)
            if line["step"] >= before:
                continue
            if "heldout" in line:
                found.heldout.append((line["step"], line["heldout"]))
            else:
                found.steps.append(Step(**line))
    return found


def new_console() -> Console:
    """The screen, or a file that is as wide as our tables."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


class Monitor:
    """Follows one run of `total_steps` steps that writes to `folder`."""

    def __init__(self, title: str, folder: Path, total_steps: int, console: Console | None = None) -> None:
        self.folder = folder
        self.total_steps = total_steps
        self.history = History()
        self._earlier = History()  # what the runs before have logged that this one has resumed
        self._file = folder / "history.jsonl"
        self.console = console or new_console()
        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._progress.add_task(title, total=total_steps, now="")
        self._progress.start()
        if not self.console.is_terminal:
            self.console.print(title)

    def log_step(self, step: Step) -> None:
        self._write(step.step, asdict(step))
        self.history.steps.append(step)
        now = f"loss {step.loss:.3f}  {step.tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._task, completed=step.step, now=now)
        # A log file gets ten lines instead of a bar.
        if not self.console.is_terminal and (step.step == 1 or step.step % max(1, self.total_steps // 10) == 0):
            self.console.print(f"step {step.step:>5}/{self.total_steps}  {now}", highlight=False)

    def log_heldout(self, step: int, loss: float) -> None:
        self._write(step, {"step": step, "heldout": loss})
        self.history.heldout.append((step, loss))

    def stop(self) -> None:
        """Takes the progress bar off the screen; `finish` does so too."""
        self._progress.stop()

    def finish(
        self,
        swaps: Report,
        tensorboard: Path,
        unigram_entropy: float | None,
        next_command: str,
        overflows: Skipped | None = None,
    ) -> None:
        """Draws the loss curve, writes summary.json and prints what a user wants to know at the end."""
        self.stop()
        if not self.history.steps:
            self.console.print(
                "No step was logged: the run was already complete, or has trained fewer steps than one is logged of."
            )
            return
        tokens_per_s = median(step.tokens_per_s for step in self.history.steps[1:] or self.history.steps)
        begun = self.history.steps[0].step
        self.history = History(self._earlier.steps + self.history.steps, self._earlier.heldout + self.history.heldout)
        first, last = self.history.steps[0], self.history.steps[-1]
        curve = self._draw(unigram_entropy)
        skipped = 0 if overflows is None else overflows.skipped_steps
        summary = self._write_summary(swaps, tokens_per_s, unigram_entropy, skipped)

        self.console.print(swaps.table())
        facts = Table.grid(padding=(0, 2))
        steps = f"over {last.step} steps" if first.step == 1 else f"from step {first.step} to {last.step}"
        facts.add_row("loss", f"{first.loss:.3f} → {last.loss:.3f} nats per token {steps}")
        if self.history.heldout:
            facts.add_row("held-out loss", f"{self.history.heldout[-1][1]:.3f}")
        if unigram_entropy is not None:
            facts.add_row("for scale", f"{unigram_entropy:.3f}: the entropy of the corpus' bytes, each taken alone")
        facts.add_row("speed", f"{tokens_per_s:,.0f} tokens/s per device (median)")
        if last.expert_load is not None:
            dropped = sum(step.dropped_rows or 0 for step in self.history.steps)
            facts.add_row("expert load", f"busiest expert {last.expert_load:.2f} × the mean; {dropped} rows dropped")
        if overflows is not None and skipped:
            since = "" if begun == 1 else f" since step {begun}"
            facts.add_row(
                "skipped steps",
                f"{skipped}{since}: experts had no room for {overflows.lost_rows:,} rows; the logs name layers",
            )
        facts.add_row("TensorBoard", f"tensorboard --logdir {tensorboard}")
        facts.add_row("loss curve", str(curve))
        facts.add_row("summary", str(summary))
        facts.add_row("next", next_command)
        self.console.print(facts, highlight=False, soft_wrap=True)

    def _write(self, step: int, line: dict[str, Any]) -> None:
        """Adds a line to the file; before the first one it drops what an earlier run in this folder has seen from that
        step on: of a run that begins, all of it, of one that is resumed, the steps after its checkpoint."""
        if not (self.history.steps or self.history.heldout):
            self._earlier = _read(self._file, step)
            kept = [json.dumps(asdict(logged)) for logged in self._earlier.steps]
            kept += [json.dumps({"step": at, "heldout": loss}) for at, loss in self._earlier.heldout]
            replace_file(self._file, "".join(text + "\n" for text in kept))
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _write_summary(self, swaps: Report, tokens_per_s: float, unigram_entropy: float | None, skipped: int) -> Path:
        path = self.folder / "summary.json"
        content: dict[str, Any] = {
            "swapped": [dict(zip(("modules", "from", "to", "count"), row, strict=True)) for row in swaps.summary()],
            "steps": [asdict(step) for step in self.history.steps],
            "heldout": [{"step": step, "loss": loss} for step, loss in self.history.heldout],
            "skipped_steps": skipped,
            "tokens_per_s_per_device": tokens_per_s,
            "peak_gib_per_device": max(step.peak_gib for step in self.history.steps),
            "unigram_entropy": unigram_entropy,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def _draw(self, unigram_entropy: float | None) -> Path:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([s.step for s in self.history.steps], [s.loss for s in self.history.steps], label="training")
        if self.history.heldout:
            axes.plot(*zip(*self.history.heldout, strict=True), "o", label="held-out files")
        if unigram_entropy is not None:
            axes.axhline(unigram_entropy, color="gray", linestyle="--", label="entropy of single bytes")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        path = self.folder / "loss.png"
        figure.savefig(path, dpi=120)
        return path
