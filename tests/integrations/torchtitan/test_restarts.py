"""A killed process ends no run: all are started again, and go on from the newest checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ... import processes
from .dying import STEP
from .runs import SMALL

ROOT = Path(__file__).parents[3]
DIES = "torchtitan.experimental.custom_import=tests.integrations.torchtitan.dying"


def losses(folder: Path, *arguments: str) -> tuple[dict[int, float], subprocess.CompletedProcess[str]]:
    """Of a run of `flashmoe train` in processes of their own, and all that it said."""
    command = [sys.executable, "-m", "flashmoe_train.cli", "train", "deepseek_v3_debug", *SMALL, f"folder={folder}"]
    result = subprocess.run(
        [*command, "checkpoint.every=2", "training.validate_steps=1", "--processes=2", "--allow-fallback", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    summary = folder / "summary.json"
    steps = json.loads(summary.read_text())["steps"] if summary.exists() else []
    return {step["step"]: step["loss"] for step in steps}, result


def goes_on(tmp_path: Path, *overrides: str, rounding: float = 0.0) -> None:
    """`rounding`: how far losses may be apart where sums have no fixed order. Without its optimizer's state a run is
    apart by 0.1, one that has begun anew by 1."""
    whole, result = losses(tmp_path / "whole", *overrides)
    assert result.returncode == 0, result.stderr
    found, result = losses(tmp_path / "killed", DIES, "--restarts=1", *overrides)
    assert result.returncode == 0, result.stderr
    assert found == pytest.approx(whole, rel=0, abs=rounding), (found, whole)  # the steps before the kill among them
    assert "process 1 was ended by SIGKILL: all processes start again, restart 1 of 1" in result.stderr
    log = (tmp_path / "killed/log_rank0.txt").read_text()
    assert f"Training starts at step {STEP}" in log


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three starts of everything
def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    goes_on(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dispatch", ["stock", "flashmoe"])
def test_a_killed_process_is_started_again_on_gpus(dispatch: str, tmp_path: Path) -> None:
    """With our exchange too, which then still is over peer memory."""
    processes.need_gpus(2)
    goes_on(tmp_path, f"swap.dispatch={dispatch}", rounding=2e-2)
    if dispatch == "flashmoe":
        log = (tmp_path / "killed/log_rank0.txt").read_text()
        assert log.count("exchange tokens over peer memory") == 2


def test_restarts_need_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashmoe_train.cli", "train", "quickstart", "--restarts=3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert "error: --restarts 3: without checkpoints a run would begin anew; say [checkpoint] every" in result.stderr


def test_a_usage_error_is_not_repeated(tmp_path: Path) -> None:
    """One that the processes find; a [torchtitan] table that is none is left to them too."""
    command = [sys.executable, "-m", "flashmoe_train.cli", "train", "quickstart", "torchtitan.checkpoint=3"]
    result = subprocess.run([*command, "--restarts=2", "--processes=1"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: [torchtitan.checkpoint] must be a table, found 3\n"
