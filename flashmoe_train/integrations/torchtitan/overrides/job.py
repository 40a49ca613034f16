"""From the tables of a job to TorchTitan 0.3.x's configuration tree, with every mistake named before a process group
exists.

Tables are in the words of 0.2.x's job files, so that recipes say the same to both generations. Most keys are a field of
the same name in the tree; `_RENAMED` has those that moved, `_SPECIAL` those that became something else. A key of the
tree that job files never had works too, under its own name.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.trainer import Trainer

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.integrations.sizes import Sizes
from flashmoe_train.integrations.torchtitan import checks, generation
from flashmoe_train.integrations.torchtitan.checks import known
from flashmoe_train.integrations.torchtitan.config import FlashMoE, validate
from flashmoe_train.integrations.torchtitan.overrides import models
from flashmoe_train.integrations.torchtitan.overrides.data import WholeSequences
from flashmoe_train.schema import key_name, table_name

_OURS = "flashmoe_train.integrations.torchtitan"
_IMPORTS = {
    "attention": ("flex_attention", "varlen_attention"),
    "moe": ("routed_experts",),
}

# Tables and keys of 0.2.x's job files that are elsewhere in the tree.
_RENAMED_TABLES = {"profiling": "profiler", "validation": "validator"}
_RENAMED = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
    "validation.dataset": "validator.dataloader.dataset",
    "validation.dataset_path": "validator.dataloader.dataset_path",
}
_ADAM = {"lr": float, "eps": float, "weight_decay": float, "beta1": float, "beta2": float}
_MODES: dict[str, type | None] = {
    "none": None,
    "selective": SelectiveAC.Config,
    "full": FullAC.Config,
    "memory_budget": MemoryBudgetAC.Config,
}

# What became something else than a field: the type of its value.
_SPECIAL: dict[str, Any] = {
    "job.custom_config_module": str,
    "job.description": str,
    "model.name": str,
    "model.flavor": str,
    "model.converters": list[str],
    "optimizer.name": str,
    "activation_checkpoint.mode": str,
    "activation_checkpoint.selective_ac_option": str,
    "activation_checkpoint.memory_budget": float,
    "validation.seq_len": int,
    "validation.local_batch_size": int,
    "parallelism.expert_tensor_parallel_degree": int,
    **{f"flashmoe.{field.name}": type(field.default) for field in dataclasses.fields(FlashMoE)},
    **{f"optimizer.{key}": kind for key, kind in _ADAM.items()},
}


def check_tables(tables: dict[str, Any], name: str = "") -> None:
    """Raises UsageError for keys that this TorchTitan has no place for, with the nearest one that it has, and for
    values of the wrong type. `name` is what the tables are called together in the file they are from."""
    tree = _empty()
    prefix = (name,) if name else ()
    for table, entries in tables.items():
        keys = _keys_of(table, tree)
        if not keys or table == "flashmoe":
            found = f"table {table_name(*prefix, table)}" if isinstance(entries, dict) else f"key {key_name(table)}"
            raise UsageError(f"unknown {found} of {_this()}; {nearest(table, _tables(tree))}")
        if not isinstance(entries, dict):
            raise UsageError(f"{table_name(*prefix, table)} must be a table, found {entries!r}")
        for key, value in entries.items():
            if key not in keys:
                where = key_name(*prefix, table, key)
                raise UsageError(f"unknown key {where} of {_this()}; {nearest(key, sorted(keys))}")
            try:
                TypeAdapter(keys[key]).validate_json(json.dumps(value, default=str), strict=True)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                raise UsageError(f"{key_name(*prefix, table, key)} = {value!r}: {message}") from None


def _this() -> str:
    return f"torchtitan {importlib.metadata.version('torchtitan')}"


def _tables(tree: Trainer.Config) -> list[str]:
    own = {field.name for field in dataclasses.fields(tree) if dataclasses.is_dataclass(getattr(tree, field.name))}
    spoken = {place.split(".")[0] for place in (*_RENAMED, *_SPECIAL)} | set(_RENAMED_TABLES)
    return sorted((own | spoken) - {"flashmoe", "model_spec", "loss", "tokenizer"})


def _keys_of(table: str, tree: Trainer.Config) -> dict[str, Any]:
    """The keys that a table may have, with their types."""
    found: dict[str, Any] = {}
    node = getattr(tree, _RENAMED_TABLES.get(table, table), None)
    if table in _tables(tree) and dataclasses.is_dataclass(node):
        hints = get_type_hints(type(node))
        for field in dataclasses.fields(node):
            if not dataclasses.is_dataclass(getattr(node, field.name)):
                found[field.name] = hints[field.name]
    found.pop("param_groups", None)  # what [optimizer] says in words of its own
    for place, target in _RENAMED.items():
        if place.split(".")[0] == table:
            owner, field_name = _place(tree, target)
            found[place.split(".")[1]] = get_type_hints(type(owner))[field_name]
    return found | {place.split(".")[1]: kind for place, kind in _SPECIAL.items() if place.split(".")[0] == table}


def parse(tables: dict[str, Any]) -> Trainer.Config:
    """The configuration tree of the tables: TorchTitan's own, with the overrides in it that `[flashmoe]` asks for."""
    name, flavor = _model(tables)
    found = models.spec(name, flavor)
    vocabulary = found.model.vocab_size
    config = _empty(WholeSequences if models.whole_sequences(name, flavor) else HuggingFaceTextDataLoader)
    config.model_spec = found
    config.loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=vocabulary))
    _choose_checkpointing(config, tables.get("activation_checkpoint", {}))
    for table, entries in tables.items():
        for key, value in entries.items():
            place = f"{table}.{key}"
            if place in _SPECIAL:
                _set_special(config, place, value, tables)
            else:
                _set(config, _RENAMED.get(place, f"{_RENAMED_TABLES.get(table, table)}.{key}"), value)
    if flavor == models.FLAVOR:
        models.plain_below_original_length(config.model_spec.model, config.training.seq_len)
    if (start := config.checkpoint.initial_load_path) is not None and "://" not in start:
        config.checkpoint.initial_load_path = str(Path(start).absolute())  # it takes no other
    _import_overrides(config, _choices(tables))
    if "disable_cuda_graphs" not in tables.get("training", {}):
        config.training.disable_cuda_graphs = not _takes_cuda_graphs(config)
    try:
        config.checkpoint.__post_init__()
        config.parallelism.__post_init__()
        config.validator.__post_init__()
        config.__post_init__()
    except (ValueError, AssertionError) as error:
        raise UsageError(f"torchtitan: {error}") from None
    return config


def _empty(loader: type[HuggingFaceTextDataLoader] = HuggingFaceTextDataLoader) -> Trainer.Config:
    """TorchTitan's defaults. CUDA graphs are decided when the rest is known."""
    return Trainer.Config(
        optimizer=default_adamw(),
        dataloader=loader.Config(),
        validator=Validator.Config(dataloader=loader.Config(dataset="c4_validation", infinite=False)),
        training=TrainingConfig(disable_cuda_graphs=True),
    )


def _model(tables: dict[str, Any]) -> tuple[str, str]:
    model = tables.get("model", {})
    return model.get("name", "llama3"), model.get("flavor", "debugmodel")


def _choices(tables: dict[str, Any]) -> FlashMoE:
    choices = FlashMoE(**tables.get("flashmoe", {}))
    validate(choices)
    if choices.dispatch == "flashmoe":
        raise UsageError(f'[flashmoe] dispatch = "flashmoe" is not there yet for {_this()}; "stock" is')
    return choices


def _place(config: Any, place: str) -> tuple[Any, str]:
    *path, field = place.split(".")
    for part in path:
        config = getattr(config, part)
    return config, field


def _set(config: Trainer.Config, place: str, value: Any) -> None:
    owner, field = _place(config, place)
    if not hasattr(owner, field):  # a setting of another kind of checkpointing than the one that is chosen
        table = place.rpartition(".")[0]
        raise UsageError(f"[{table}] {field} = {value!r} has no effect on the mode that is chosen; leave it out")
    setattr(owner, field, value)


def _set_special(config: Trainer.Config, place: str, value: Any, tables: dict[str, Any]) -> None:
    table, key = place.split(".")
    group = config.optimizer.param_groups[0]
    if place == "optimizer.name":
        group.optimizer_name = value
    elif table == "optimizer" and key.startswith("beta"):
        betas = list(group.optimizer_kwargs["betas"])
        betas[int(key[-1]) - 1] = value
        group.optimizer_kwargs["betas"] = tuple(betas)
    elif table == "optimizer":
        group.optimizer_kwargs[key] = value
    elif table == "validation":
        if value != getattr(config.training, key, None) and value != tables.get("training", {}).get(key):
            raise UsageError(f"[validation] {key} = {value}: {_this()} validates with [training] {key}")
    elif place == "parallelism.expert_tensor_parallel_degree" and value != 1:
        raise UsageError(f"[parallelism] {key} = {value}: {_this()} has no such degree; leave it out")
    elif place == "model.converters" and (others := [name for name in value if name != "flashmoe"]):
        raise UsageError(f"[model] converters = {others}: {_this()} has none, it has [torchtitan.override] imports")
    elif place == "job.custom_config_module" and value != _OURS:
        raise UsageError(f"[job] {key} = {value!r}: {_this()} has no such key")


def _choose_checkpointing(config: Trainer.Config, entries: dict[str, Any]) -> None:
    if "mode" in entries:
        known("[activation_checkpoint] mode", entries["mode"], _MODES)
        chosen = _MODES[entries["mode"]]
        config.activation_checkpoint = None if chosen is None else chosen()
    option = entries.get("selective_ac_option", "op")
    if option != "op":
        raise UsageError(
            f"[activation_checkpoint] selective_ac_option = {option!r}: {_this()} selects by operator alone, 'op'"
        )
    if "memory_budget" in entries and isinstance(config.activation_checkpoint, MemoryBudgetAC.Config):
        config.activation_checkpoint.memory_budget = entries["memory_budget"]


def _import_overrides(config: Trainer.Config, choices: FlashMoE) -> None:
    imports = [name for part, names in _IMPORTS.items() if getattr(choices, part) == "flashmoe" for name in names]
    if imports:
        imports.append("checkpointing")
    config.override.imports = [*config.override.imports, *(f"{_OURS}.overrides.{name}" for name in imports)]


def _takes_cuda_graphs(config: Trainer.Config) -> bool:
    """TorchTitan refuses them for pipelines and, unless the exchange has kernels of its own, for expert parallelism."""
    parallelism = config.parallelism
    return (
        torch.cuda.is_available()
        and parallelism.pipeline_parallel_degree == 1
        and parallelism.expert_parallel_degree == 1
    )


def check(config: Trainer.Config, world_size: int) -> None:
    """Raises UsageError where the values name something that does not exist, contradict each other, do not fit
    `world_size` processes or cannot run with what is swapped."""
    found = config.model_spec
    assert found is not None
    sizes = models.sizes(found)
    known("[training] dataset", config.dataloader.dataset, DATASETS)
    if config.validator.enable:
        known("[validation] dataset", config.validator.dataloader.dataset, DATASETS)
    group = config.optimizer.param_groups[0]
    known("[optimizer] name", group.optimizer_name, ("Adam", "AdamW", "DistMuon"))
    checks.check(config, world_size, sizes, found.flavor, config.validator.freq, config.hf_assets_path)
    model: Any = found.model
    checks.check_pipeline(config.parallelism, len(model.layers), _generate_llm_fqn_per_model_part)
    _check_sizes(config, world_size, sizes)
    choices = facts(config).choices
    if choices.attention == "flashmoe" and config.parallelism.context_parallel_degree > 1:
        raise UsageError("context_parallel_degree > 1 is not supported with swapped attention; set it to 1")
    if choices.attention == "stock" and not torch.cuda.is_available() and not config.checkpoint.create_seed_checkpoint:
        raise UsageError(f"stock attention of {_this()} cannot train on a CPU: it has no kernels there")


def _check_sizes(config: Trainer.Config, world_size: int, sizes: Sizes) -> None:
    """What the mesh, the loss and FSDP divide."""
    parallelism, seq_len = config.parallelism, config.training.seq_len
    tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    chunks = config.loss.num_chunks if isinstance(config.loss, ChunkedLossWrapper.Config) else 1
    sequence = tensor if parallelism.enable_sequence_parallel else 1
    for needed, why in (
        (
            sequence * (2 * context if context > 1 else 1),
            f"tensor_parallel_degree {tensor}, context_parallel_degree {context}",
        ),
        (chunks * context, f"the {chunks} pieces in which {_this()} computes the loss"),
    ):
        if seq_len % needed:
            raise UsageError(f"[training] seq_len = {seq_len} must be a multiple of {needed}, because of {why}")
    checks.divides("tensor_parallel_degree", tensor, f"the vocabulary of {sizes.vocabulary}", sizes.vocabulary)
    if parallelism.expert_parallel_degree == 1:
        checks.check_expert_shards(sizes, 1, 1, checks.fsdp_processes(parallelism, world_size))


def sizes(tables: dict[str, Any]) -> Sizes:
    """Of the model that the tables name."""
    return models.sizes(models.spec(*_model(tables)))


def activate(job: Any) -> None:
    """Lets a recipe's job swap: `parse` names the overrides for what `[flashmoe]` says."""


def facts(config: Trainer.Config) -> generation.Facts:
    """Where this configuration has what both generations know."""
    assert config.model_spec is not None
    imported = {entry if isinstance(entry, str) else entry[0] for entry in config.override.imports}
    chosen = {
        part: "flashmoe" if all(f"{_OURS}.overrides.{name}" in imported for name in names) else "stock"
        for part, names in _IMPORTS.items()
    }
    return generation.Facts(
        model=config.model_spec.name,
        folder=Path(config.dump_folder),
        tokenizer=config.hf_assets_path,
        dataset=config.dataloader.dataset,
        validates=config.validator.enable,
        choices=FlashMoE(**chosen),  # type: ignore[arg-type]
    )


def use_tokenizer(config: Trainer.Config, folder: Path) -> None:
    """Trains with the tokenizer in `folder`."""
    config.hf_assets_path = str(folder)


def settings(config: Trainer.Config) -> Iterator[tuple[str, str, Any]]:
    """Every value: where a job's tables have it, what TorchTitan calls it, and what it is."""
    group = config.optimizer.param_groups[0]
    checkpointing = config.activation_checkpoint
    kinds = {kind: name for name, kind in _MODES.items()}
    mode = kinds[None if checkpointing is None else type(checkpointing)]
    assert config.model_spec is not None
    yield "model.name", "model_spec.name", config.model_spec.name
    yield "model.flavor", "model_spec.flavor", config.model_spec.flavor
    yield "optimizer.name", "optimizer.param_groups[0].optimizer_name", group.optimizer_name
    for key in ("lr", "eps", "weight_decay"):
        yield f"optimizer.{key}", f"optimizer.param_groups[0].{key}", group.optimizer_kwargs[key]
    yield "activation_checkpoint.mode", "activation_checkpoint", mode
    yield "flashmoe.attention", "override.imports", config.override.imports
    tables = {target: table for table, target in _RENAMED_TABLES.items()}
    places = {target: place for place, target in _RENAMED.items()}
    for shown, value in _leaves(config):
        table, _, key = shown.partition(".")
        yield places.get(shown, f"{tables.get(table, table)}.{key}"), shown, value


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(node):
        value, place = getattr(node, field.name), f"{prefix}{field.name}"
        if place in ("model_spec", "loss", "activation_checkpoint", "optimizer.param_groups", "override"):
            continue
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{place}.")
        else:
            yield place, value
