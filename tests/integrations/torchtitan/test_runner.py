"""What a run under TorchTitan leaves behind, and what its own keys do there."""

from pathlib import Path

from ... import processes
from .runs import train


def _profiles(root: Path) -> None:
    enable = [f"torchtitan.profiling.{key}" for key in ("enable_profiling=true", "profile_freq=2", "profiler_warmup=1")]
    train(root / "run", *enable, "training.steps=4")


def test_profiler_traces(tmp_path: Path) -> None:
    processes.run(_profiles, tmp_path)
    assert {path.parent.name for path in tmp_path.rglob("rank*_trace.json")} == {"iteration_2", "iteration_4"}
    assert {path.name for path in tmp_path.rglob("rank*_trace.json")} == {"rank0_trace.json", "rank1_trace.json"}
