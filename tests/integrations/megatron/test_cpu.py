"""Weights initialised on the CPU: experts that processes share begin as they would in one process alone."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashmoe_train.integrations.megatron import recipes, runner

from ... import processes
from . import jobs


def _weights(root: Path, choice: str, *overrides: str) -> dict[str, Tensor]:
    """What the model of this process begins with, its experts under their numbers among all."""
    from megatron.core import parallel_state

    swap = [f"swap.attention={choice}", f"swap.moe={choice}"]
    plan = recipes.resolve(
        jobs.recipe_of("moe", root / "run", root / "tokens.bin", *swap, *overrides), dist.get_world_size()
    )
    runner.start_processes(plan)
    try:
        first = plan.config.num_moe_experts // plan.config.expert_model_parallel_size
        first *= parallel_state.get_expert_model_parallel_rank()
        state = runner.build_model(plan).state_dict()
    finally:
        parallel_state.destroy_model_parallel()

    def number(name: str) -> str:
        return re.sub(r"(?<=local_experts\.)\d+", lambda found: str(first + int(found[0])), name)

    return {number(name): x.clone() for name, x in state.items() if isinstance(x, Tensor)}


def _alone(root: Path) -> None:
    torch.save(_weights(root, "stock"), root / "alone.pt")


def _together(root: Path) -> None:
    wanted = torch.load(root / "alone.pt")
    for choice in ("stock", "flashmoe"):
        found = _weights(root, choice, "parallel.expert=2")
        experts = {name for name in found if "local_experts" in name}
        assert 2 * len(experts) == sum("local_experts" in name for name in wanted) == 16
        other = [name for name, x in found.items() if not torch.equal(x, wanted[name])]
        assert not other, f"{choice}: other than in one process: {other}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_begin_as_in_one_process(world_size: int, tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_alone, tmp_path, processes=1)
    processes.run(_together, tmp_path, processes=world_size)
