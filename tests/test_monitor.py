"""What stays of a run."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flashmoe_train.monitor import Monitor, Step
from flashmoe_train.swap import Report


@dataclass
class Lost:
    skipped_steps: int = 2
    lost_rows: int = 1234


def begun(folder: Path, steps: range, text: io.StringIO) -> Monitor:
    monitor = Monitor("a run", folder, steps[-1], Console(file=text, width=120))
    for step in steps:
        monitor.log_step(Step(step, loss=10.0 - step, grad_norm=1.0, tokens_per_s=100.0 * step))
        if step % 3 == 0:
            monitor.log_heldout(step, 5.0 + step)
    return monitor


def run(folder: Path, steps: range, text: io.StringIO) -> dict:
    begun(folder, steps, text).finish(Report(), folder / "tb", None, "next", Lost())
    return json.loads((folder / "summary.json").read_text())


def test_a_resumed_run_remembers_what_was_before(tmp_path: Path) -> None:
    text = io.StringIO()
    run(tmp_path, range(1, 6), text)
    assert "skipped steps  2: experts had no room for 1,234 rows" in text.getvalue()
    summary = run(tmp_path, range(4, 8), text)  # from the checkpoint after step 3
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3, 4, 5, 6, 7]
    assert summary["tokens_per_s_per_device"] == 600.0
    assert summary["heldout"] == [{"step": 3, "loss": 8.0}, {"step": 6, "loss": 11.0}]
    assert "loss           9.000 → 3.000 nats per token over 7 steps" in text.getvalue()
    assert "skipped steps  2 since step 4: experts had no room for 1,234 rows" in text.getvalue()
    assert summary["skipped_steps"] == 2
    assert [step["step"] for step in run(tmp_path, range(1, 3), text)["steps"]] == [1, 2]


def test_a_run_that_was_killed_is_remembered_too(tmp_path: Path) -> None:
    """It has written no summary."""
    text = io.StringIO()
    begun(tmp_path, range(1, 7), text).stop()
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # the kill came in the middle of a line
    begun(tmp_path, range(5, 10), text).stop()  # from the checkpoint after step 4, and killed again
    summary = run(tmp_path, range(9, 11), text)
    assert [step["step"] for step in summary["steps"]] == [*range(1, 11)]
    assert [check["step"] for check in summary["heldout"]] == [3, 6, 9]
    assert "over 10 steps" in text.getvalue()


def test_says_from_where_it_knows_the_steps(tmp_path: Path) -> None:
    text = io.StringIO()
    (tmp_path / "history.jsonl").write_text("not ours\n")
    assert [step["step"] for step in run(tmp_path, range(6, 8), text)["steps"]] == [6, 7]
    assert "loss           4.000 → 3.000 nats per token from step 6 to 7" in text.getvalue()
