"""What a run under TorchTitan leaves behind, and what its own keys do there."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import runner

from ... import processes
from .runs import QuietTrainer, train


def _profiles(root: Path) -> None:
    enable = [f"torchtitan.profiling.{key}" for key in ("enable_profiling=true", "profile_freq=2", "profiler_warmup=1")]
    train(root / "run", *enable, "training.steps=4")


def _writes_from_all_ranks(root: Path) -> None:
    overrides = [f"folder={root}", "torchtitan.metrics.save_for_all_ranks=true", "model.num_hidden_layers=1"]
    trainer = QuietTrainer(runner.prepare(recipe.load("deepseek_v3_debug", overrides), 2, True))
    assert (trainer.monitor is not None) == (dist.get_rank() == 0)
    trainer.close()


def test_one_process_shows_the_run_whoever_writes_metrics(tmp_path: Path) -> None:
    processes.run(_writes_from_all_ranks, tmp_path)


def test_profiler_traces(tmp_path: Path) -> None:
    processes.run(_profiles, tmp_path)
    assert {path.parent.name for path in tmp_path.rglob("rank*_trace.json")} == {"iteration_2", "iteration_4"}
    assert {path.name for path in tmp_path.rglob("rank*_trace.json")} == {"rank0_trace.json", "rank1_trace.json"}


def test_refuses_to_train_in_float32_by_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FSDP a recipe's precision is not that of tensor parallelism, and our kernels have no float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("flashmoe_train.ops.attention.has_kernel", lambda *_: True)
    overrides = [f"folder={tmp_path}", "parallel.tensor=2"]
    loaded = recipe.load("llama3_8b_4gpu", overrides)
    runner.prepare(loaded, 4, False)
    runner.prepare(loaded, 2, True)
    text = r"found torch.float32 \(\[training\] dtype, .* without FSDP, where precision is bfloat16\); --allow-fallback"
    with pytest.raises(UsageError, match=text):
        runner.prepare(loaded, 2, False)
    runner.prepare(recipe.load("llama3_8b_4gpu", [*overrides, "torchtitan.training.dtype=bfloat16"]), 2, False)
