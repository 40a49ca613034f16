"""Values of a job that contradict each other or do not fit the processes, named before a process group exists: what
both generations of TorchTitan would stumble over later, under the names of a job file."""

import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from flashmoe_train import data
from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.integrations.sizes import Sizes
from flashmoe_train.schema import LatentAttention

_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "expert_tensor_parallel_degree",
)


def check(config: Any, world_size: int, sizes: Sizes, flavor: str, validate_every: int, tokenizer: str) -> None:
    """Raises UsageError for what no job may say. `config` is TorchTitan's, of which both generations have the tables
    that are read here; the rest is handed over."""
    checkpoint = config.checkpoint
    if checkpoint.create_seed_checkpoint and not (checkpoint.enable and world_size == 1):
        raise UsageError("[checkpoint] create_seed_checkpoint needs enable = true and one process (--processes 1)")
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("[metrics] enable_wandb: Weights & Biases is not installed: pip install wandb")
    _check_degrees(config.parallelism, world_size)
    _check_expert_parallelism(config.parallelism, world_size, sizes, flavor)
    _check_numbers(config, world_size, sizes, validate_every)
    _check_optimizer(config.optimizer)
    _check_profiling(config)
    _check_names(config)
    data.check_tokenizer("[model] hf_assets_path", tokenizer, ("vocab.json", "vocab.txt"))
    start = checkpoint.initial_load_path
    if checkpoint.enable and start and not Path(start).is_dir():
        raise UsageError(f"[checkpoint] initial_load_path = {start!r}: no such folder")


def _check_degrees(parallelism: Any, world_size: int) -> None:
    degrees = {key: getattr(parallelism, key) for key in _DEGREES if hasattr(parallelism, key)}
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


def _check_numbers(config: Any, world_size: int, sizes: Sizes, validate_every: int) -> None:
    training, parallelism = config.training, config.parallelism
    counts = {
        "[training] steps": training.steps,
        "[training] seq_len": training.seq_len,
        "[training] local_batch_size": training.local_batch_size,
        "[training] gc_freq": training.gc_freq,
        "[metrics] log_freq": config.metrics.log_freq,
        "[validation] freq": validate_every,
        "[checkpoint] interval": config.checkpoint.interval,
        "[parallelism] pipeline_parallel_microbatch_size": parallelism.pipeline_parallel_microbatch_size,
    }
    validation = getattr(config, "validation", None)  # 0.3 validates with what [training] says
    if validation is not None and validation.enable:
        counts["[validation] seq_len"] = validation.seq_len
        counts["[validation] local_batch_size"] = validation.local_batch_size
    for key, count in counts.items():
        at_least(key, count, 1)
    stages = parallelism.pipeline_parallel_degree
    tensor = parallelism.tensor_parallel_degree
    for heads in (sizes.heads, sizes.kv_heads):
        divides("tensor_parallel_degree", tensor, f"the model's {heads} heads", heads)
    at_once = training.local_batch_size * (world_size // (stages * tensor * parallelism.context_parallel_degree))
    if training.global_batch_size > 0 and training.global_batch_size % at_once:
        raise UsageError(
            f"[training] global_batch_size = {training.global_batch_size} must be a multiple of {at_once}, which is "
            f"local_batch_size ({training.local_batch_size}) on all data-parallel processes"
        )
    piece = parallelism.pipeline_parallel_microbatch_size
    if stages > 1:
        batch = training.local_batch_size
        divides("pipeline_parallel_microbatch_size", piece, f"[training] local_batch_size ({batch})", batch)
    pieces = training.local_batch_size // piece
    if stages > 1 and pieces < stages:
        raise UsageError(
            f"[parallelism] pipeline_parallel_degree {stages}: a process' batch of {training.local_batch_size} makes "
            f"{pieces} pieces of {piece}, and every stage needs one"
        )


def _check_optimizer(optimizer: Any) -> None:
    """What torch's Adam refuses when it is built."""
    keys = ("lr", "eps", "weight_decay")
    if hasattr(optimizer, "param_groups"):  # 0.3
        said = optimizer.param_groups[0].optimizer_kwargs
        numbers, betas = {key: said.get(key, 0.0) for key in keys}, said.get("betas", ())
    else:
        numbers, betas = {key: getattr(optimizer, key) for key in keys}, (optimizer.beta1, optimizer.beta2)
    for key, number in numbers.items():
        at_least(f"[optimizer] {key}", number, 0)
    for i, beta in enumerate(betas, 1):
        if not isinstance(beta, float) or not 0 <= beta < 1:  # torch takes no 0 for 0.0
            raise UsageError(f"[optimizer] beta{i} must be a float, at least 0.0 and less than 1, found {beta}")


def _check_profiling(config: Any) -> None:
    profiling = config.profiling if hasattr(config, "profiling") else config.profiler
    every = profiling.profile_freq
    if profiling.enable_memory_snapshot:
        own = getattr(profiling, "memory_snapshot_freq", None)  # of 0.3, which takes profile_freq without it
        if own is None:
            at_least("[profiling] profile_freq", every, 1)
        else:
            at_least("[profiling] memory_snapshot_freq", own, 1)
    if profiling.enable_profiling:
        warmup, active = profiling.profiler_warmup, profiling.profiler_active
        at_least("[profiling] profiler_warmup", warmup, 0)
        at_least("[profiling] profiler_active", active, 1)
        if every < warmup + active:
            raise UsageError(
                f"[profiling] profile_freq must be at least {warmup + active}, which is profiler_warmup ({warmup}) and "
                f"profiler_active ({active}), found {every}"
            )


def _check_names(config: Any) -> None:
    for component in config.compile.components:
        known("[compile] components", component, ("model", "loss"))
    if not hasattr(config, "experimental"):  # 0.3 has neither converters nor imports of this kind
        return
    if module := config.experimental.custom_import:
        _check_import("[experimental] custom_import", module)
        return  # it may bring converters
    from torchtitan.protocols.model_converter import _registry_model_converter_cls

    for name in config.model.converters:
        known("[model] converters", name, _registry_model_converter_cls)


def _check_import(key: str, module: str) -> None:
    """Raises UsageError unless Python finds the module where training will look: torchrun's processes, unlike the
    `flashmoe` that starts them, have the working folder in their path."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found, why = importlib.util.find_spec(module) is not None, "no such module"
    except Exception as error:  # of the packages around it, which this imports
        found, why = False, f"{type(error).__name__}: {error}"
    finally:
        sys.path.remove(here)
    if not found:
        raise UsageError(f"{key} = {module!r} cannot be imported, from {here} or what is installed: {why}")


def _check_expert_parallelism(parallelism: Any, world_size: int, sizes: Sizes, flavor: str) -> None:
    degree = parallelism.expert_parallel_degree
    if degree == 1:
        return
    if sizes.experts is None:
        raise UsageError(f"[parallelism] expert_parallel_degree {degree}: {flavor} has no experts")
    number = sizes.experts.number
    divides("expert_parallel_degree", degree, f"the {number} experts", number)
    # TorchTitan takes these processes from those of data, context and (unless the experts keep it) tensor parallelism.
    tensor = getattr(parallelism, "expert_tensor_parallel_degree", 1)
    if tensor not in (1, parallelism.tensor_parallel_degree):
        raise UsageError(
            f"[parallelism] expert_tensor_parallel_degree {tensor} must be 1 or tensor_parallel_degree, which is "
            f"{parallelism.tensor_parallel_degree}"
        )
    shared = world_size // (parallelism.pipeline_parallel_degree * parallelism.data_parallel_replicate_degree)
    if shared % (degree * tensor) != 0:
        raise UsageError(
            f"[parallelism] expert_parallel_degree {degree} × expert_tensor_parallel_degree "
            f"{tensor} must divide the {shared} processes of each pipeline stage"
        )
    check_expert_shards(sizes, degree, tensor, shared // (degree * tensor))


def fsdp_processes(parallelism: Any, world_size: int) -> int:
    """Over how many processes FSDP shards: those of data and of context parallelism."""
    return world_size // (
        parallelism.tensor_parallel_degree
        * parallelism.pipeline_parallel_degree
        * parallelism.data_parallel_replicate_degree
    )


def check_expert_shards(sizes: Sizes, degree: int, tensor: int, shards: int) -> None:
    """Raises UsageError where FSDP over so many `shards` of what expert and tensor parallelism leave of the experts'
    weights cannot cut these: where there are more processes than experts it cuts their second dimension, evenly."""
    experts = sizes.experts
    if experts is None or degree * shards <= experts.number:
        return
    for what, size in (("hidden dim", experts.hidden_dim // tensor), ("model dim", sizes.dim)):
        if size % shards:
            raise UsageError(
                f"[parallelism] expert_parallel_degree {degree}: {degree * shards} processes share {experts.number} "
                f"experts, and FSDP over {shards} of them does not divide an expert's {what} ({size})"
            )


def check_pipeline(parallelism: Any, layers: int, split: Callable[[int, int, int, int], Any]) -> None:
    """Raises UsageError where TorchTitan cannot cut the model for the schedule; `split`, its own, is called with the
    numbers of stages and layers, and with what the ends count as, in layers."""
    degree, name = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1 or parallelism.pipeline_parallel_schedule_csv:
        return
    try:
        schedule = get_schedule_class(name)
    except ValueError as error:
        raise UsageError(f"[parallelism] pipeline_parallel_schedule = {name!r}: {error}") from None
    if inspect.isabstract(schedule):
        raise UsageError(
            f"[parallelism] pipeline_parallel_schedule = {name!r} is no schedule, but what some have in common"
        )
    if parallelism.module_fqns_per_model_part is not None:
        return
    one, each = issubclass(schedule, PipelineScheduleSingle), parallelism.pipeline_parallel_layers_per_stage
    ends = parallelism.pipeline_parallel_first_stage_less_layers, parallelism.pipeline_parallel_last_stage_less_layers
    stages = degree if one else 2 * degree
    if each is not None:
        if each < 1:
            raise UsageError(f"[parallelism] pipeline_parallel_layers_per_stage must be at least 1, found {each}")
        stages = math.ceil((layers + sum(ends)) / each)
        if stages % degree or (stages == degree) != one:
            wanted = "one" if one else "the same number, two or more,"
            raise UsageError(
                f"[parallelism] pipeline_parallel_layers_per_stage {each}: {layers} layers, and {sum(ends)} that the "
                f"ends count as, make {stages} stages; {name} needs {wanted} on each of {degree} processes"
            )
    try:
        split(stages, layers, *ends)
    except ValueError as error:
        raise UsageError(
            f"[parallelism] pipeline_parallel_degree {degree}: {name} cuts the model's {layers} layers into {stages} "
            f"stages, which TorchTitan cannot: {error}"
        ) from None


def check_latent(mla: LatentAttention) -> None:
    """Raises UsageError where TorchTitan cannot rotate the keys that one projection gives behind the latent values."""
    if mla.kv_lora_rank % 2:
        raise UsageError(
            f"[model.mla] kv_lora_rank = {mla.kv_lora_rank} must be even: TorchTitan reads the keys behind these values"
            " as complex numbers"
        )


def divides(key: str, degree: int, what: str, size: int) -> None:
    """Raises UsageError unless the `[parallelism]` key's value divides `size`."""
    if size % degree:
        raise UsageError(f"[parallelism] {key} {degree} does not divide {what}")


def at_least(key: str, number: float, least: int) -> None:
    """Raises UsageError for less, and for no number at all (nan)."""
    if not number >= least:
        raise UsageError(f"{key} must be at least {least}, found {number}")


def known(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `choices`."""
    choices = sorted(choices)
    if value not in choices:
        raise UsageError(f"{key} = {value!r} does not exist; {nearest(value, choices)}")
