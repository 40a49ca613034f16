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


def run(folder: Path, steps: range, text: io.StringIO) -> dict:
    monitor = Monitor("a run", folder, steps[-1], Console(file=text, width=120))
    for step in steps:
        monitor.log_step(Step(step, loss=10.0 - step, grad_norm=1.0, tokens_per_s=100.0 * step))
    monitor.log_heldout(steps[-1], 5.0)
    monitor.finish(Report(), folder / "tb", None, "next", Lost())
    return json.loads((folder / "summary.json").read_text())


def test_a_resumed_run_remembers_what_was_before(tmp_path: Path) -> None:
    text = io.StringIO()
    run(tmp_path, range(1, 6), text)
    summary = run(tmp_path, range(4, 8), text)  # from the checkpoint after step 3
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3, 4, 5, 6, 7]
    assert summary["tokens_per_s_per_device"] == 600.0 and len(summary["heldout"]) == 1
    assert "loss           9.000 → 3.000 nats per token over 7 steps" in text.getvalue()
    assert "skipped steps  2: experts had no room for 1,234 rows" in text.getvalue()
    assert summary["skipped_steps"] == 2
    (tmp_path / "summary.json").write_text("{}")
    assert [step["step"] for step in run(tmp_path, range(6, 8), text)["steps"]] == [6, 7]
    assert [step["step"] for step in run(tmp_path, range(1, 3), text)["steps"]] == [1, 2]
