"""The command line from end to end: the quickstart as the README starts it, and what is said when it cannot start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashmoe_train import recipe, train
from flashmoe_train.errors import UsageError


def flashmoe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashmoe_train.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_trains_and_reports(tmp_path: Path) -> None:
    overrides = ("training.steps=4", "training.seq_len=64", "training.validate_steps=1")
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
    assert all(step["dropped_rows"] == 0 and 1 <= step["expert_load"] <= 8 / 3 for step in summary["steps"])
    (events,) = run.glob("tb/*")
    logged = EventAccumulator(str(events)).Reload()
    for tag in ("loss_metrics/global_avg_loss", "expert_load/max_over_mean", "expert_load/dropped_rows"):
        assert [event.step for event in logged.Scalars(tag)] == [1, 2, 3, 4]
    assert "Training starts at step 1" in (run / "log_rank0.txt").read_text()
    assert recipe.load(str(run / "recipe.toml")).training.steps == 4
    for text in (
        "What was swapped",
        "FlashMoEAttention",
        "held-out loss",
        "for scale",
        "expert load",
        "tensorboard --logdir",
        "next",
    ):
        assert text in result.stdout
    suggested = result.stdout.replace("\n", " ").split("next ")[1]
    assert "training.steps=8" in suggested and "training.steps=4" not in suggested


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("quickstrat",), "did you mean 'quickstart'"),
        (("quickstart", "steps"), "table.key=value"),
        (("quickstart", "training.stepz=3"), "unknown key [training] stepz"),
        (("quickstart", "parallel.context=3", "--processes=2"), "needs a multiple of 3 processes, found 2"),
        (("quickstart", "model.vocab_size=100", "--processes=1"), "has 258 tokens, the model's vocab_size is 100"),
    ],
)
def test_mistakes_end_without_a_traceback(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    result = flashmoe("train", *arguments, "--allow-fallback", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and text in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("rank, waited", [("0", 0), ("1", 20)])
def test_the_first_process_says_what_is_wrong(
    rank: str, waited: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait meanwhile, since torchrun ends all when one ends; and say it if nobody has ended them by then."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        assert capsys.readouterr().err == ""
        slept.append(seconds)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train.time, "sleep", sleep)
    with pytest.raises(SystemExit, match="2"):
        train.main("missing_recipe")
    assert slept == [waited] and "missing_recipe" in capsys.readouterr().err


def test_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="started by torchrun"):
        train.train("quickstart", [], allow_fallback=False)


def test_next_command_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flashmoe").touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert Path(train.command_name()).resolve() == tmp_path / "flashmoe"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert train.command_name() == "flashmoe"
