"""What a recipe comes to under TorchTitan, from its job and a model on the meta device."""

import dataclasses
import logging
from typing import Any

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from flashmoe_train.explain import Explanation, Setting
from flashmoe_train.integrations.torchtitan import compat, converter, job, recipes
from flashmoe_train.schema import Recipe
from flashmoe_train.swap import Report


def explain(recipe: Recipe, processes: int, everything: bool = False) -> Explanation:
    """Resolves the recipe for that many processes, builds its model without memory and swaps what would be swapped.

    `everything` lists TorchTitan's own defaults too. Raises UsageError for what could not be trained.
    """
    logging.getLogger().setLevel(logging.ERROR)  # TorchTitan warns of what is filled in later
    resolved, config = recipes.resolve(recipe, processes)
    dims = _parallel_dims(config, processes)
    model_args = job.model_args(resolved.tables)
    model_args.update_from_config(config)
    with torch.device("meta"):
        model = get_train_spec(config.model.name).model_cls(model_args)
    converter.FlashMoEConverter(config, dims).convert(model)
    return Explanation(
        model=f"{config.model.name}: {_parameters(model, model_args)}",
        processes=_shares(config, dims),
        step=_step(config, dims),
        settings=_settings(resolved, config, everything),
        swaps=converter.FlashMoEConverter.last_report or Report(),
        operators=compat.operators(converter.choices(config), config, model_args),
    )


def _parallel_dims(config: JobConfig, processes: int) -> ParallelDims:
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


def _parameters(model: nn.Module, model_args: Any) -> str:
    counts = {name: p.numel() for name, p in model.named_parameters()}
    whole, routed = sum(counts.values()), sum(n for name, n in counts.items() if ".moe.experts." in name)
    text = f"{whole / 1e6:,.1f} million parameters"
    if routed:
        experts = model_args.moe_args
        at_work = whole - routed + routed * experts.top_k // experts.num_experts
        text += f", {at_work / 1e6:,.1f} million at work for a token"
    return text


def _shares(config: JobConfig, dims: ParallelDims) -> str:
    degrees = {
        "pipeline": dims.pp,
        "replicas": dims.dp_replicate,
        "FSDP": dims.dp_shard,
        "context": dims.cp,
        "tensor": dims.tp,
    }
    product = " × ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "no parallelism"
    experts = f"; experts over {dims.ep}" if dims.ep > 1 else ""
    return f"{dims.world_size}: {product}{experts}"


def _step(config: JobConfig, dims: ParallelDims) -> str:
    training, replicas = config.training, dims.dp_replicate * dims.dp_shard
    at_once = training.local_batch_size * replicas
    sequences = training.global_batch_size if training.global_batch_size > 0 else at_once
    turns = f" in {sequences // at_once} turns" if sequences > at_once else ""
    tokens = f"{sequences * training.seq_len:,} tokens = {sequences} sequences of {training.seq_len:,}"
    return f"{tokens}; each of {replicas} data-parallel processes takes {training.local_batch_size} at once{turns}"


def _settings(resolved: recipes.Job, config: JobConfig, everything: bool) -> list[Setting]:
    own = f"[{resolved.name}]" if resolved.name else "job file"
    found = []
    for table, entries in dataclasses.asdict(config).items():
        for key, value in entries.items():
            place = f"{table}.{key}"
            if resolved.get(place) is not None:
                found.append(Setting(place, value, resolved.said_by.get(place, own)))
            elif everything:
                found.append(Setting(place, value, "TorchTitan's default"))
    return found
