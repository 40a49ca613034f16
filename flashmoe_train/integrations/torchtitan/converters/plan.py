"""What a TorchTitan 0.2.x configuration comes to: its model on the meta device, swapped, and its mesh."""

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from flashmoe_train.integrations.sizes import Sizes
from flashmoe_train.integrations.torchtitan.converters import compat
from flashmoe_train.integrations.torchtitan.converters.converter import FlashMoEConverter
from flashmoe_train.swap import Report


def build(config: JobConfig, processes: int) -> tuple[nn.Module, Sizes, ParallelDims, Report]:
    """The model without memory, with what would be swapped in it. Raises UsageError for what could not be trained."""
    spec = get_train_spec(config.model.name)
    arguments = spec.model_args[config.model.flavor]
    arguments.update_from_config(config)
    dims = _mesh(config, processes)
    with torch.device("meta"):
        model = spec.model_cls(arguments)
    FlashMoEConverter(config, dims).convert(model)
    return model, compat.sizes(arguments), dims, FlashMoEConverter.last_report or Report()


def precision(config: JobConfig, processes: int) -> str:
    """The dtype of products on that many processes."""
    return compat.precision(config, _mesh(config, processes))


def _mesh(config: JobConfig, processes: int) -> ParallelDims:
    parallelism = config.parallelism
    return ParallelDims(
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=parallelism.data_parallel_shard_degree,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        pp=parallelism.pipeline_parallel_degree,
        ep=parallelism.expert_parallel_degree,
        etp=parallelism.expert_tensor_parallel_degree,
        world_size=processes,
    )
