"""From a job file's tables to TorchTitan's JobConfig, with every mistake named before a process group exists."""

import copy
import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.logging import logger

from flashmoe_train.errors import UsageError, nearest

BYTE_TOKENIZER = "bytes"  # as [model] hf_assets_path: one token per byte, written into the run's folder


def parse(tables: dict[str, Any]) -> JobConfig:
    """TorchTitan's JobConfig of the tables. Raises UsageError for unknown keys and values of the wrong type."""

    class Manager(ConfigManager):
        def _maybe_load_toml(self, args: list[str]) -> dict[str, Any]:
            return tables

        def _dict_to_dataclass(self, cls: type, data: dict[str, Any]) -> Any:
            # TorchTitan checks keys, without a hint, and leaves types to whatever they break later.
            check_keys(cls, data)
            check_types(cls, data)
            return super()._dict_to_dataclass(cls, data)

    return Manager().parse_args([])


def check_keys(cls: type, data: dict[str, Any], table: str = "") -> None:
    """Raises UsageError that names an unknown key and the nearest known one."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in data.items():
        place = f"[{table}] {key}" if table else f"[{key}]"
        if key not in fields:
            raise UsageError(f"unknown {'key' if table else 'table'} {place}; {nearest(key, sorted(fields))}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UsageError(f"{place} must be a table, found {value!r}")
            check_keys(fields[key], value, f"{table}.{key}" if table else key)  # type: ignore[arg-type]


def check_types(cls: type, data: dict[str, Any]) -> None:
    """Raises UsageError that names every value of a wrong type; "False" is no boolean and "10" no number."""
    try:
        TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = (
            f"[{'.'.join(map(str, e['loc'][:-1]))}] {e['loc'][-1]} = {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise UsageError("\n".join(problems)) from None


def check(config: JobConfig, world_size: int) -> None:
    """Raises UsageError where the values name something that does not exist, contradict each other or do not fit
    `world_size` processes."""
    spec = _train_spec(config.model.name)
    known("[model] flavor", config.model.flavor, spec.model_args)
    known("[training] dataset", config.training.dataset, DATASETS)
    if config.validation.enable:
        known("[validation] dataset", config.validation.dataset, DATASETS)
    if config.checkpoint.create_seed_checkpoint and not (config.checkpoint.enable and world_size == 1):
        raise UsageError("[checkpoint] create_seed_checkpoint needs enable = true and one process (--processes 1)")
    _check_degrees(config, world_size)
    _check_expert_parallelism(config, world_size, spec.model_args[config.model.flavor])


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


def _check_expert_parallelism(config: JobConfig, world_size: int, model_args: Any) -> None:
    parallelism = config.parallelism
    degree = parallelism.expert_parallel_degree
    if degree == 1:
        return
    moe = getattr(model_args, "moe_args", None)
    if moe is None or not getattr(model_args, "moe_enabled", True):
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


def with_defaults(tables: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The tables with what `flashmoe train` adds to a job file; each is logged, and none replaces a value.

    TorchTitan's own defaults name files of its repository: here they are the byte tokenizer and the quickstart's
    corpus. Without a GPU the default precision is float32. And an expert_parallel_degree of -1 means as many processes
    as the experts can be spread over.
    """
    tables = copy.deepcopy(tables)
    added = [("model", "hf_assets_path", BYTE_TOKENIZER), ("training", "dataset", "torch_sources")]
    if not torch.cuda.is_available():
        added.append(("training", "mixed_precision_param", "float32"))
    for table, key, value in added:
        entries = tables.setdefault(table, {})
        if isinstance(entries, dict) and key not in entries:  # what is no table is refused by `parse`
            entries[key] = value
            logger.info(f"flashmoe: the job sets no [{table}] {key}, taking {value!r}")
    parallelism = tables.get("parallelism")
    if isinstance(parallelism, dict) and parallelism.get("expert_parallel_degree") == -1:
        parallelism["expert_parallel_degree"] = _largest_expert_degree(tables, world_size)
    return tables


def _largest_expert_degree(tables: dict[str, Any], world_size: int) -> int:
    model = tables["model"]
    spec = _train_spec(model.get("name", "llama3"))
    known("[model] flavor", model.get("flavor", "debugmodel"), spec.model_args)
    moe = getattr(spec.model_args[model.get("flavor", "debugmodel")], "moe_args", None)
    return 1 if moe is None else math.gcd(moe.num_experts, world_size)


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
