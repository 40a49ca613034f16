"""Megatron on two GPUs."""

from pathlib import Path

import pytest

from flashmoe_train import recipe
from flashmoe_train.compare import compare
from flashmoe_train.monitor import new_console

from ... import processes

pytestmark = pytest.mark.gpu


def test_our_exchange(tmp_path: Path) -> None:
    """In bfloat16, over peer memory, with gradients that are summed in float32, against stock."""
    processes.need_gpus(2)
    overrides = ["training.steps=8", "training.precision=bfloat16", "parallel.expert=2", "swap.dispatch=flashmoe"]
    loaded = recipe.load("megatron_moe_debug", [f"folder={tmp_path}/run", *overrides])
    assert compare(loaded, 2, False, new_console()) <= 2e-2
    log = (tmp_path / "run/compare/flashmoe/log_rank0.txt").read_text()
    assert "experts on 2 processes exchange tokens over peer memory" in log and "was skipped" not in log
