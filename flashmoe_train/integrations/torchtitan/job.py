"""From tables to TorchTitan's JobConfig, with every mistake named before a process group exists."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from flashmoe_train import data
from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.integrations.torchtitan import compat
from flashmoe_train.schema import key_name, lines, table_name


def check_tables(tables: dict[str, Any], name: str = "") -> None:
    """Raises UsageError for unknown keys of TorchTitan's tables, with the nearest known one, and for values of the
    wrong type. TorchTitan checks keys, without a hint, and leaves types to whatever they break later. `name` is what
    the tables are called together in the file they are from."""
    _check_keys(JobConfig, tables, *filter(None, [name]))
    try:
        TypeAdapter(JobConfig).validate_json(json.dumps(tables, default=str), strict=True)
    except ValidationError as error:
        raise UsageError(lines(_problem(e, *filter(None, [name])) for e in error.errors())) from None


def _problem(error: Any, *place: str) -> tuple[str, str]:
    schema: Any = JobConfig
    for part in error["loc"]:
        place = (*place, part)
        schema = next((field.type for field in dataclasses.fields(schema) if field.name == part), None)
        if not dataclasses.is_dataclass(schema):
            break  # what follows is inside the value
    return f"{key_name(*place)} = {error['input']!r}: ", error["msg"]


def _check_keys(cls: type, tables: dict[str, Any], *place: str) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in tables.items():
        known = fields.get(key)
        if known is None:
            named = f"table {table_name(*place, key)}" if isinstance(value, dict) else f"key {key_name(*place, key)}"
            raise UsageError(f"unknown {named}; {nearest(key, sorted(fields))}")
        if dataclasses.is_dataclass(known):
            if not isinstance(value, dict):
                raise UsageError(f"{table_name(*place, key)} must be a table, found {value!r}")
            _check_keys(known, value, *place, key)  # type: ignore[arg-type]


def parse(tables: dict[str, Any]) -> JobConfig:
    """TorchTitan's JobConfig of the tables."""

    class Manager(ConfigManager):
        def _maybe_load_toml(self, args: list[str]) -> dict[str, Any]:
            return tables

    return Manager().parse_args([])


def check(config: JobConfig, world_size: int) -> None:
    """Raises UsageError where the values name something that does not exist, contradict each other or do not fit
    `world_size` processes."""
    spec = _train_spec(config.model.name)
    known("[model] flavor", config.model.flavor, spec.model_args)
    model_args = spec.model_args[config.model.flavor]
    if not hasattr(model_args, "n_heads"):
        raise UsageError(f"[model] name = {config.model.name!r} is not a language model")
    known("[training] dataset", config.training.dataset, DATASETS)
    if config.validation.enable:
        known("[validation] dataset", config.validation.dataset, DATASETS)
    if config.checkpoint.create_seed_checkpoint and not (config.checkpoint.enable and world_size == 1):
        raise UsageError("[checkpoint] create_seed_checkpoint needs enable = true and one process (--processes 1)")
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("[metrics] enable_wandb: Weights & Biases is not installed: pip install wandb")
    _check_degrees(config, world_size)
    if config.parallelism.pipeline_parallel_degree > 1 and spec.pipelining_fn is None:
        raise UsageError(f"[parallelism] pipeline_parallel_degree: TorchTitan cannot pipeline {config.model.name}")
    _check_expert_parallelism(config, world_size, model_args)
    _check_numbers(config, world_size, model_args)
    _check_paths(config)


def _check_degrees(config: JobConfig, world_size: int) -> None:
    degrees = {
        key: getattr(config.parallelism, key)
        for key in (
            "data_parallel_replicate_degree",
            "data_parallel_shard_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "context_parallel_degree",
            "expert_parallel_degree",
            "expert_tensor_parallel_degree",
        )
    }
    for key, degree in degrees.items():
        if degree < 1 and not (key == "data_parallel_shard_degree" and degree == -1):
            or_rest = ", or -1 for all that is left" if key == "data_parallel_shard_degree" else ""
            raise UsageError(f"[parallelism] {key} must be at least 1{or_rest}, found {degree}")
    fixed = {key: degree for key, degree in degrees.items() if degree not in (-1, 1) and "expert" not in key}
    rest_shards = degrees["data_parallel_shard_degree"] == -1
    needed = math.prod(fixed.values())
    if world_size % needed != 0 or (world_size != needed and not rest_shards):
        product = " × ".join(f"{key} {degree}" for key, degree in fixed.items()) or "all degrees are 1"
        multiple = "a multiple of " if rest_shards else ""
        raise UsageError(f"[parallelism] {product}: needs {multiple}{needed} processes, found {world_size}")


def _check_numbers(config: JobConfig, world_size: int, model_args: Any) -> None:
    training, parallelism = config.training, config.parallelism
    counts = {
        "[training] steps": training.steps,
        "[training] seq_len": training.seq_len,
        "[training] local_batch_size": training.local_batch_size,
        "[metrics] log_freq": config.metrics.log_freq,
        "[validation] freq": config.validation.freq,
        "[checkpoint] interval": config.checkpoint.interval,
    }
    for key, count in counts.items():
        if count < 1:
            raise UsageError(f"{key} must be at least 1, found {count}")
    known("[optimizer] name", config.optimizer.name, ("Adam", "AdamW"))
    stages = parallelism.pipeline_parallel_degree
    tensor = parallelism.tensor_parallel_degree
    for heads in (model_args.n_heads, getattr(model_args, "n_kv_heads", None) or model_args.n_heads):
        if heads % tensor:
            raise UsageError(f"[parallelism] tensor_parallel_degree {tensor} does not divide the model's {heads} heads")
    at_once = training.local_batch_size * (world_size // (stages * tensor * parallelism.context_parallel_degree))
    if training.global_batch_size > 0 and training.global_batch_size % at_once:
        raise UsageError(
            f"[training] global_batch_size = {training.global_batch_size} must be a multiple of {at_once}, which is "
            f"local_batch_size ({training.local_batch_size}) on all data-parallel processes"
        )
    pieces = training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
    if stages > 1 and pieces < stages:
        raise UsageError(
            f"[parallelism] pipeline_parallel_degree {stages}: a process' batch of {training.local_batch_size} makes "
            f"{pieces} pieces of {parallelism.pipeline_parallel_microbatch_size}, and every stage needs one"
        )


def _check_paths(config: JobConfig) -> None:
    data.check_tokenizer("[model] hf_assets_path", config.model.hf_assets_path)
    start = config.checkpoint.initial_load_path
    if config.checkpoint.enable and start and not Path(start).is_dir():
        raise UsageError(f"[checkpoint] initial_load_path = {start!r}: no such folder")


def _check_expert_parallelism(config: JobConfig, world_size: int, model_args: Any) -> None:
    parallelism = config.parallelism
    degree = parallelism.expert_parallel_degree
    if degree == 1:
        return
    moe = compat.experts_of(model_args)
    if moe is None:
        raise UsageError(f"[parallelism] expert_parallel_degree {degree}: {config.model.flavor} has no experts")
    if moe.num_experts % degree != 0:
        raise UsageError(f"[parallelism] expert_parallel_degree {degree} does not divide the {moe.num_experts} experts")
    # TorchTitan takes these processes from those of data, context and (unless the experts keep it) tensor parallelism.
    shared = world_size // (parallelism.pipeline_parallel_degree * parallelism.data_parallel_replicate_degree)
    if shared % (degree * parallelism.expert_tensor_parallel_degree) != 0:
        raise UsageError(
            f"[parallelism] expert_parallel_degree {degree} × expert_tensor_parallel_degree "
            f"{parallelism.expert_tensor_parallel_degree} must divide the {shared} processes of each pipeline stage"
        )


def model_args(tables: dict[str, Any]) -> Any:
    """The arguments of the model that the tables name."""
    name, flavor = (tables.get("model", {}).get(key, default) for key, default in _MODEL.items())
    flavors = _train_spec(name).model_args
    known("[model] flavor", flavor, flavors)
    return flavors[flavor]


_MODEL = {"name": "llama3", "flavor": "debugmodel"}  # TorchTitan's own defaults


def _train_spec(name: str) -> TrainSpec:
    from torchtitan.models import _supported_models

    try:
        return get_train_spec(name)
    except ValueError:
        hint = nearest(name, sorted(_supported_models))
        raise UsageError(f"[model] name = {name!r} is not a model; {hint}") from None


def known(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `choices`."""
    choices = sorted(choices)
    if value not in choices:
        raise UsageError(f"{key} = {value!r} does not exist; {nearest(value, choices)}")
