"""From tables to TorchTitan's JobConfig, with every mistake named before a process group exists."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.integrations.sizes import Sizes
from flashmoe_train.integrations.torchtitan import checks
from flashmoe_train.integrations.torchtitan.checks import known
from flashmoe_train.integrations.torchtitan.converters import compat, converter
from flashmoe_train.integrations.torchtitan.generation import OURS, Facts
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
    arguments = spec.model_args[config.model.flavor]
    if not hasattr(arguments, "n_heads"):
        raise UsageError(f"[model] name = {config.model.name!r} is not a language model")
    known("[training] dataset", config.training.dataset, DATASETS)
    if config.validation.enable:
        known("[validation] dataset", config.validation.dataset, DATASETS)
    known("[optimizer] name", config.optimizer.name, ("Adam", "AdamW"))
    if config.parallelism.pipeline_parallel_degree > 1 and spec.pipelining_fn is None:
        raise UsageError(f"[parallelism] pipeline_parallel_degree: TorchTitan cannot pipeline {config.model.name}")
    attention = getattr(arguments, "attn_type", "sdpa")
    if (degree := config.parallelism.context_parallel_degree) > 1 and attention != "sdpa":
        raise UsageError(
            f"[parallelism] context_parallel_degree {degree}: TorchTitan 0.2 has no context parallelism with document"
            f" masks ({attention} attention)"
        )
    sizes = compat.sizes(arguments)
    checks.check(config, world_size, sizes, config.model.flavor, config.validation.freq, config.model.hf_assets_path)
    checks.check_pipeline(config.parallelism, arguments.n_layers, generate_llm_fqn_per_model_part)
    _check_lengths(config)
    if config.parallelism.tensor_parallel_degree > 1:
        _check_widths(config, spec.model_cls, copy.deepcopy(arguments))
    compat.check_expert_mesh(config, world_size)


def _check_lengths(config: JobConfig) -> None:
    """TorchTitan 0.2 asserts more than it needs: an even length, whatever is parallel."""
    tensor, context = config.parallelism.tensor_parallel_degree, config.parallelism.context_parallel_degree
    if config.training.seq_len % (tensor * 2 * context):
        raise UsageError(
            f"[training] seq_len = {config.training.seq_len} must be a multiple of {tensor * 2 * context}, which is "
            f"2 × [parallelism] tensor_parallel_degree {tensor} × context_parallel_degree {context}"
        )
    needed = tensor * (2 * context if context > 1 else 1)
    if config.validation.enable and config.validation.seq_len % needed:
        raise UsageError(
            f"[validation] seq_len = {config.validation.seq_len} must be a multiple of {needed}, because of "
            f"[parallelism] tensor_parallel_degree {tensor} and context_parallel_degree {context}"
        )


def _check_widths(config: JobConfig, model_class: Any, arguments: Any) -> None:
    """Of layers that tensor parallelism cuts where DTensor cannot make up for a rest: dense ones and shared experts."""
    tensor = config.parallelism.tensor_parallel_degree
    arguments.update_from_config(config)
    with torch.device("meta"):
        model = model_class(arguments)
    for name, module in model.named_modules():
        if name.endswith(("feed_forward", "shared_experts")) and isinstance(getattr(module, "w1", None), nn.Linear):
            width = module.w1.out_features
            checks.divides("tensor_parallel_degree", tensor, f"the width of {name} ({width})", width)


def sizes(tables: dict[str, Any]) -> Sizes:
    """Of the model that the tables name."""
    return compat.sizes(model_args(tables))


def activate(job: Any) -> None:
    """Lets a recipe's job swap: TorchTitan's converters, and our table that says what."""
    job.say("job.custom_config_module", "flashmoe_train.integrations.torchtitan", OURS)
    job.add("model.converters", "flashmoe")


def facts(config: JobConfig) -> Facts:
    """Where this configuration has what both generations know."""
    return Facts(
        model=config.model.name,
        folder=Path(config.job.dump_folder),
        tokenizer=config.model.hf_assets_path,
        dataset=config.training.dataset,
        validates=config.validation.enable,
        choices=converter.choices(config),
    )


def use_tokenizer(config: JobConfig, folder: Path) -> None:
    """Trains with the tokenizer in `folder`."""
    config.model.hf_assets_path = str(folder)


def settings(config: JobConfig) -> Iterator[tuple[str, str, Any]]:
    """Every value: where a job's tables have it, what TorchTitan calls it, and what it is."""
    for table, entries in dataclasses.asdict(config).items():
        for key, value in entries.items():
            yield f"{table}.{key}", f"{table}.{key}", value


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
