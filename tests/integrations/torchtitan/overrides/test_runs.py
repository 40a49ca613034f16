"""Runs of recipes under TorchTitan 0.3.x from end to end: the command line, what runs leave, work that is kept."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_train.doctor import examine
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.overrides import config_registry

from .... import processes
from .runs import STEPS, texts, train

NAME = "qwen3_moe_debug"
RUNS = ("whole", "resumed", "started")
CHECKPOINTS = ("checkpoint.every=2", "training.global_batch_size=8", "parallel.expert=2")


def test_quickstart_trains_and_reports(tmp_path: Path) -> None:
    changes = ("training.steps=3", "training.seq_len=64", "training.validate_steps=1", "model.num_hidden_layers=3")
    command = [sys.executable, "-m", "flashmoe_train.cli", "train", "quickstart", *changes, "--processes=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "outputs/quickstart/summary.json").read_text())
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3] and summary["heldout"][-1]["step"] == 3
    assert all(step["dropped_rows"] == 0 and 1 <= step["expert_load"] <= 8 / 3 for step in summary["steps"])
    assert [(row["modules"], row["from"], row["to"], row["count"]) for row in summary["swapped"]] == [
        ("layers.*.attention.inner_attention", "FlexAttention", "FlashMoEAttention", 3),
        ("layers.*.moe.routed_experts", "RoutedExperts", "FlashMoERoutedExperts", 2),
        ("layers.*.moe.routed_experts.inner_experts", "GroupedExperts", "FlashMoEExperts", 2),
    ]
    assert "What was swapped" in done.stdout and "held-out loss" in done.stdout


def test_titans_own_command_takes_recipes(tmp_path: Path) -> None:
    """On CPUs only once our package has been imported, which tells TorchTitan of them."""
    path = tmp_path / "my.toml"
    sizes = "[training]\nsteps = 9\nseq_len = 64\n[torchtitan.metrics]\nlog_freq = 1\n"
    path.write_text(f'framework = "torchtitan"\nconfig = "llama3_debug"\n{sizes}')
    options = ["--config", str(path), "--training.steps", "2"]
    module = "flashmoe_train.integrations.torchtitan.overrides"
    start = "runpy.run_module('torchtitan.train', run_name='__main__')"
    (tmp_path / "train.py").write_text(f"import runpy, flashmoe_train.integrations.torchtitan\n{start}\n")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "train.py", "--module", module]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4]), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "Training completed" in printed and "FlashMoEAttention" in printed
    assert re.search(r"step:\s+2\b", printed) and not re.search(r"step:\s+3\b", printed)


def test_recipes_are_configurations_by_name() -> None:
    assert callable(config_registry.quickstart)
    with pytest.raises(UsageError, match=r"no recipe 'quickstrat'.*did you mean 'quickstart'"):
        config_registry.quickstrat  # noqa: B018


def _goes_on(root: Path, file: str, *changes: str) -> None:
    losses, trainer = train(NAME, root, *CHECKPOINTS, *changes, from_seed=False)
    if changes:
        trainer.export(None)
    if trainer.monitor is not None:
        (root / file).write_text(json.dumps(losses))


def _starts(root: Path) -> None:
    start = (f"checkpoint.start_from={root / 'run/huggingface'}", f"folder={root / 'from export'}")
    losses, _ = train(NAME, root, *start, "training.steps=1", from_seed=False)
    (root / "started.json").write_text(json.dumps(losses))


def test_resumes_bitwise_and_starts_from_what_it_exports(tmp_path: Path) -> None:
    texts(tmp_path / "texts.jsonl")
    processes.run(_goes_on, tmp_path, "whole.json")
    shutil.rmtree(tmp_path / f"run/checkpoint/step-{STEPS}")
    processes.run(_goes_on, tmp_path, "resumed.json", "checkpoint.export=huggingface")
    processes.run(_starts, tmp_path, processes=1)
    whole, resumed, started = (json.loads((tmp_path / f"{name}.json").read_text()) for name in RUNS)
    assert resumed == whole[2:]
    assert started[0] < whole[-1]  # the weights after those steps


def test_doctor_knows_the_pair() -> None:
    found = [finding for finding in examine() if finding.subject == "torchtitan"]
    assert [finding.state for finding in found] == ["ok"] and found[0].text == "0.3.0 with torch 2.14: tested"


def test_mistakes_end_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashmoe_train.cli", "train", "quickstart", "torchtitan.training.stepz=3"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run([*command, "--processes=1"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: unknown key [torchtitan.training] stepz of torchtitan 0.3.0; did you mean")
