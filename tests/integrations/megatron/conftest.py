"""These tests need Megatron-core: environments without it leave them out."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from flashmoe_train.integrations.megatron import cpu, installed

if importlib.util.find_spec("megatron") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only one of Megatron's groups."""
    installed.check()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with cpu.adjusted():
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(0)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
