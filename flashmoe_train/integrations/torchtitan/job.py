"""From a job file's tables to TorchTitan's JobConfig, with every mistake named before a process group exists."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from flashmoe_train.errors import UsageError


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
            raise UsageError(f"unknown {'key' if table else 'table'} {place}; {nearest(key, fields)}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UsageError(f"{place} must be a table, found {value!r}")
            check_keys(fields[key], value, f"{table}.{key}" if table else key)  # type: ignore[arg-type]


def check_types(cls: type, data: dict[str, Any]) -> None:
    """Raises UsageError that names every value of a wrong type."""
    try:
        TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        problems = (
            f"[{'.'.join(map(str, e['loc'][:-1]))}] {e['loc'][-1]} = {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise UsageError("\n".join(problems)) from None


def check(config: JobConfig, world_size: int) -> None:
    """Raises UsageError where the values name something that does not exist or do not fit `world_size` processes."""
    spec = _train_spec(config.model.name)
    known("[model] flavor", config.model.flavor, spec.model_args)
    known("[training] dataset", config.training.dataset, DATASETS)
    if config.validation.enable:
        known("[validation] dataset", config.validation.dataset, DATASETS)
    degrees = {
        key: getattr(config.parallelism, key)
        for key in (
            "data_parallel_replicate_degree",
            "data_parallel_shard_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "context_parallel_degree",
        )
    }
    fixed = {key: degree for key, degree in degrees.items() if degree not in (-1, 1)}
    rest_shards = degrees["data_parallel_shard_degree"] == -1
    needed = math.prod(fixed.values())
    if world_size % needed != 0 or (world_size != needed and not rest_shards):
        product = " × ".join(f"{key} {degree}" for key, degree in fixed.items()) or "all degrees are 1"
        multiple = "a multiple of " if rest_shards else ""
        raise UsageError(f"[parallelism] {product}: needs {multiple}{needed} processes, found {world_size}")


def _train_spec(name: str) -> TrainSpec:
    from torchtitan.models import _supported_models

    try:
        return get_train_spec(name)
    except ValueError:
        raise UsageError(f"[model] name = {name!r} is not a model; {nearest(name, _supported_models)}") from None


def known(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UsageError(f"{key} = {value!r} does not exist; {nearest(value, choices)}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for the end of an error's text."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"possible: {', '.join(choices)}"
