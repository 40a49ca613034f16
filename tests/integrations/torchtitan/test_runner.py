"""What a run under TorchTitan leaves behind, and what its own keys do there."""

from pathlib import Path

import torch.distributed as dist

from flashmoe_train import recipe
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
