"""From a recipe to what Megatron is told: the arguments of its configurations, and who says each."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from flashmoe_train import data, huggingface
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import sizes
from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.integrations.megatron import checks, installed, models, token_files
from flashmoe_train.integrations.megatron.tables import OURS, Job, configurations
from flashmoe_train.schema import Checkpoint, Data, Model, Recipe


@dataclasses.dataclass(frozen=True)
class Layout:
    """How processes and sequences are shared."""

    processes: int
    tensor: int
    pipeline: int
    expert: int
    data: int  # processes that see different sequences, in each direction
    micro_batch: int  # sequences that a process takes at once
    turns: int  # how often it does in a step

    @property
    def sequences(self) -> int:
        return self.micro_batch * self.turns * self.data


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe, checked: what the runner builds and trains."""

    recipe: Recipe
    model: Model
    data: Data
    layout: Layout
    arguments: dict[str, Any]  # GPTModel's
    config: Any  # TransformerConfig
    optimizer: Any  # OptimizerConfig
    ddp: Any  # DistributedDataParallelConfig
    scheduler: dict[str, Any]  # OptimizerParamScheduler's
    sharing: Sharing | None  # of experts by our exchange; None: Megatron's, or nothing is to be exchanged
    job: Job
    steps: int
    seq_len: int
    seed: int
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        return self.config.params_dtype


def resolve(recipe: Recipe, processes: int) -> Plan:
    """Raises UsageError for what contradicts itself, does not fit together, or Megatron's own configurations refuse."""
    installed.check()
    model = recipe.model
    if model is None:
        raise UsageError("the recipe names no model: neither a config nor [model]")
    steps, seq_len = (_needed(recipe, key) for key in ("steps", "seq_len"))
    _check_what_is_not_done(recipe)
    job = Job(recipe)
    arguments = models.arguments(model, seq_len)
    for key, value in arguments.config.items():
        job.say(f"config.{key}", value, "[model]")
    layout = _layout(recipe, model, processes)
    degrees = {key: getattr(layout, key) for key in ("tensor", "pipeline", "expert")}
    if recipe.checkpoint.export is not None and (found := [f"{key} = {n}" for key, n in degrees.items() if n > 1]):
        raise UsageError(
            f"[checkpoint] export: under Megatron every process has to have the whole model, found [parallel] "
            f"{', '.join(found)}"
        )
    _say_parallelism(job, layout, model)
    _say_precision(job, recipe)
    _say_training(job, recipe, steps)
    config, optimizer, ddp, scheduler = configurations(job, arguments.latent)
    checks.widths(config, model, seq_len)
    stage, experts = processes // layout.pipeline, layout.expert * (config.expert_tensor_parallel_size or 1)
    if model.moe is not None and stage % experts:
        raise UsageError(
            f"[parallel] expert = {layout.expert} × [megatron] expert_tensor_parallel_size = "
            f"{config.expert_tensor_parallel_size} must divide the {stage} processes of each pipeline stage"
        )
    checks.parallelism(config)
    if recipe.swap.attention == "flashmoe":
        checks.attention(config)
    elif arguments.latent:
        raise UsageError('[swap] attention = "stock": Megatron has latent attention with TransformerEngine only')
    if recipe.swap.moe == "flashmoe" and model.moe is not None:
        checks.experts(config)
    return Plan(
        recipe=recipe,
        model=model,
        data=recipe.data or Data(),
        layout=layout,
        arguments=arguments.model,
        config=config,
        optimizer=optimizer,
        ddp=ddp,
        scheduler=scheduler,
        sharing=_sharing(recipe, layout, config, seq_len),
        job=job,
        steps=steps,
        seq_len=seq_len,
        seed=1234 if recipe.training.seed is None else recipe.training.seed,
        folder=Path(str(recipe.folder)),
    )


def _sharing(recipe: Recipe, layout: Layout, config: Any, seq_len: int) -> Sharing | None:
    swap = recipe.swap
    if swap.dispatch == "stock":
        return None
    if swap.moe == "stock":
        raise UsageError(
            '[swap] dispatch = "flashmoe" hands tokens to our experts: it needs moe = "flashmoe", found "stock"'
        )
    if layout.expert == 1:
        return None
    checks.dispatch(config)
    # Sequence parallelism shares tokens among tensor-parallel processes; validation takes one sequence at once.
    return Sharing(-(-layout.micro_batch * seq_len // layout.tensor), swap.dispatch_capacity)


def _needed(recipe: Recipe, key: str) -> int:
    value = getattr(recipe.training, key)
    if value is None:
        raise UsageError(f"[training] {key} is missing: Megatron has no default for it")
    return value


def _check_what_is_not_done(recipe: Recipe) -> None:
    training, parallel = recipe.training, recipe.parallel
    for key, said in {
        "[data] document_masks": recipe.data is not None and recipe.data.document_masks,
        "[training] compile": training.compile,
        "[parallel] replicate": parallel.replicate > 1,
        "[parallel] context": parallel.context > 1,
    }.items():
        if said:
            raise UsageError(f"{key}: recipes of Megatron do not have it yet")
    chosen = recipe.data
    assert chosen is not None  # recipe.load sees to it
    data.check_tokenizer("[data] tokenizer", chosen.tokenizer)
    for key, source in (("[data] train", chosen.train), ("[data] heldout", chosen.heldout)):
        if source is not None and not token_files.is_indexed(source):
            data.check_source(key, source)
    start = recipe.checkpoint.start_from
    if start is not None and not Path(start).is_dir():
        raise UsageError(f"[checkpoint] start_from = {start!r}: no such folder")
    if recipe.checkpoint.export is not None and recipe.model is not None:
        huggingface.check(recipe.model)


def _layout(recipe: Recipe, model: Model, processes: int) -> Layout:
    parallel, moe = recipe.parallel, model.moe
    tensor, pipeline, expert = parallel.tensor, parallel.pipeline, parallel.expert
    if processes % (tensor * pipeline):
        product = f"[parallel] tensor {tensor} × pipeline {pipeline}"
        raise UsageError(f"{product} needs a multiple of {tensor * pipeline} processes, found {processes}")
    checks.heads(tensor, model)
    if model.num_hidden_layers % pipeline:
        raise UsageError(f"[parallel] pipeline = {pipeline} does not divide the {model.num_hidden_layers} layers")
    if moe is None:
        if expert != 1:
            raise UsageError("[parallel] expert: this model has no experts")
    else:
        stage = processes // pipeline
        expert = math.gcd(moe.num_experts, stage) if expert == "auto" else expert
        if moe.num_experts % expert or stage % expert:
            raise UsageError(
                f"[parallel] expert = {expert} must divide the {moe.num_experts} experts and the {stage} processes of "
                "each pipeline stage"
            )
    assert isinstance(expert, int)
    replicas = processes // (tensor * pipeline)
    whole, most = recipe.training.global_batch_size, recipe.training.micro_batch_size
    whole = replicas * (most or 1) * pipeline if whole is None else whole
    if whole % replicas:
        raise UsageError(
            f"[training] global_batch_size = {whole} cannot be shared by {replicas} data-parallel processes: "
            f"make it a multiple of {replicas}"
        )
    share = whole // replicas
    micro = max(size for size in range(1, min(most or share, share) + 1) if share % size == 0)
    return Layout(processes, tensor, pipeline, expert, replicas, micro, share // micro)


def _say_parallelism(job: Job, layout: Layout, model: Model) -> None:
    for key in ("tensor", "pipeline"):
        job.say(f"config.{key}_model_parallel_size", getattr(layout, key), f"[parallel] {key}")
    job.say("config.context_parallel_size", 1, OURS)
    job.default("config.sequence_parallel", layout.tensor > 1)
    if model.moe is not None:
        job.say("config.expert_model_parallel_size", layout.expert, "[parallel] expert")
        job.default("config.expert_tensor_parallel_size", 1 if layout.expert > 1 else layout.tensor)
        job.default("config.moe_token_dispatcher_type", "alltoall")
        job.default("config.moe_router_dtype", "fp32")
        if layout.tensor > 1 and not job.get("config.sequence_parallel"):
            raise UsageError("[megatron] sequence_parallel = false: Megatron needs it for experts with tensor > 1")


def _say_precision(job: Job, recipe: Recipe) -> None:
    precision = recipe.training.precision or ("bfloat16" if torch.cuda.is_available() else "float32")
    dtype = getattr(torch, precision)
    says = OURS if recipe.training.precision is None else "[training] precision"
    for place, value in {
        "config.bf16": precision == "bfloat16",
        "config.fp16": False,
        "config.params_dtype": dtype,
        "config.pipeline_dtype": dtype,
        "optimizer.bf16": precision == "bfloat16",
        "optimizer.fp16": False,
        "optimizer.params_dtype": dtype,
    }.items():
        job.say(place, value, says)


_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _say_training(job: Job, recipe: Recipe, steps: int) -> None:
    training = recipe.training
    for key, value in _CHECKPOINTING[training.activation_checkpointing or "none"].items():
        job.say(f"config.{key}", value, "[training] activation_checkpointing")
    if training.deterministic is not None:
        job.say("config.deterministic_mode", training.deterministic, "[training] deterministic")
    job.say("config.transformer_impl", "local", OURS)  # without TransformerEngine
    if not torch.cuda.is_available():
        job.say("config.use_cpu_initialization", True, OURS)
    for key in ("attention_dropout", "hidden_dropout"):
        job.default(f"config.{key}", 0.0)
        if job.get(f"config.{key}") and recipe.checkpoint.model_fields_set:
            raise UsageError(f"[megatron] {key} with [checkpoint]: checkpoints do not keep random states")
    if training.learning_rate is not None:
        job.say("optimizer.lr", training.learning_rate, "[training] learning_rate")
    if (rate := job.get("optimizer.lr")) is None:
        raise UsageError("[training] learning_rate is missing: Megatron has no default for it")
    job.default("optimizer.min_lr", job.get("scheduler.min_lr") or 0.0)  # or its scheduler fails
    overlaps = job.tables["ddp"].get("overlap_param_gather", True)
    for place, value in {"optimizer.use_distributed_optimizer": True, "ddp.use_distributed_optimizer": True}.items():
        job.say(place, value, OURS)
    job.say("optimizer.overlap_param_gather", overlaps, "[megatron.ddp] overlap_param_gather")
    for key in ("overlap_param_gather", "overlap_grad_reduce", "grad_reduce_in_fp32"):
        job.default(f"ddp.{key}", True)
    if training.warmup_steps is not None:
        job.say("scheduler.lr_warmup_steps", training.warmup_steps, "[training] warmup_steps")
    decay = job.get("optimizer.weight_decay")
    decay = 0.01 if decay is None else decay  # OptimizerConfig's
    # The parameters' own rates are the optimizer's, whatever the schedule would say.
    for key, value, said_by in (
        ("max_lr", rate, job.said_by.get("optimizer.lr", "[megatron.optimizer] lr")),
        ("min_lr", job.get("optimizer.min_lr"), "[megatron.optimizer] min_lr"),
    ):
        job.say(f"scheduler.{key}", value, said_by)
    for key, default in {
        "init_lr": 0.0,
        "lr_warmup_steps": 0,
        "lr_decay_steps": steps,
        "lr_decay_style": "linear",
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_steps": steps,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,  # a resumed run has the schedule of its own recipe
    }.items():
        job.default(f"scheduler.{key}", default)
    from_checkpoint = job.get("scheduler.use_checkpoint_opt_param_scheduler")
    job.default("scheduler.override_opt_param_scheduler", not from_checkpoint)


def check_kernels(plan: Plan) -> None:
    """Raises UsageError where a Hopper GPU lacks kernels of what is swapped."""
    sizes.check_kernels(plan.recipe.swap, str(plan.dtype).removeprefix("torch."), models.sizes(plan.model))


def weights_of(recipe: Recipe) -> str | None:
    """The weights that the recipe itself starts from."""
    return recipe.checkpoint.start_from


def seed(recipe: Recipe, folder: str) -> None:
    """Nothing has to be written: from one seed swapped and stock models start with the same weights."""


def starting_from(recipe: Recipe, weights: str | None) -> Recipe:
    """The recipe, starting from those weights and saving none."""
    return recipe.model_copy(update={"checkpoint": Checkpoint(start_from=weights) if weights else Checkpoint()})
