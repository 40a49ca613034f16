"""The command line from end to end: the quickstart as the README starts it, and what is said when it cannot start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_train import train
from flashmoe_train.errors import UsageError


def flashmoe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashmoe_train.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_trains_and_reports(tmp_path: Path) -> None:
    overrides = ("training.steps=4", "training.seq_len=64", "validation.seq_len=64", "validation.steps=1")
    result = flashmoe("train", "quickstart", *overrides, "--processes=1", "--allow-fallback", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "outputs/quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3, 4]
    assert summary["heldout"][-1]["step"] == 4
    assert [(row["modules"], row["to"], row["count"]) for row in summary["swapped"]] == [
        ("layers.*.attention.inner_attention", "FlashMoEAttention", 6),
        ("layers.*.moe", "FlashMoEBlock", 5),
        ("layers.*.moe.experts", "FlashMoEExperts", 5),
    ]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("tb/*/events.out.tfevents.*"))
    log = (run / "log_rank0.txt").read_text()
    assert "the job sets no [model] hf_assets_path, taking 'bytes'" in log and "Training starts at step 1" in log
    for text in ("What was swapped", "FlashMoEAttention", "held-out loss", "tensorboard --logdir", "loss.png", "next"):
        assert text in result.stdout


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("quickstrat",), "did you mean 'quickstart'"),
        (("quickstart", "steps=3"), "table.key=value"),
        (("quickstart", "training.stepz=3"), "unknown key [training] stepz"),
        (("quickstart", "parallelism.context_parallel_degree=2", "--processes=2"), "context_parallel_degree > 1"),
    ],
)
def test_mistakes_end_without_a_traceback(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    result = flashmoe("train", *arguments, "--allow-fallback", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and text in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="started by torchrun"):
        train.train("quickstart", [], allow_fallback=False)


def test_next_command_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flashmoe").touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert Path(train._command()).resolve() == tmp_path / "flashmoe"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert train._command() == "flashmoe"
