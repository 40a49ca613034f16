"""What TorchTitan 0.2.x and its swap cannot do: combinations known to break are refused by name."""

import dataclasses
import importlib.metadata
from typing import Any

import torch
from packaging.version import Version

from flashmoe_train import versions
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import sizes as machine
from flashmoe_train.integrations.torchtitan import checks
from flashmoe_train.integrations.torchtitan.config import FlashMoE
from flashmoe_train.integrations.torchtitan.converters import context


def precision(config: Any, dims: Any) -> str:
    """The dtype of products. TorchTitan mixes precisions by FSDP or by autocast, and has neither for tensor or pipeline
    parallelism without FSDP: there it is the parameters'."""
    mixed = dims.fsdp_enabled or not (dims.tp_enabled or dims.pp_enabled)
    return config.training.mixed_precision_param if mixed else config.training.dtype


def sizes(model_args: Any) -> machine.Sizes:
    """Of the model that TorchTitan's arguments describe."""
    heads = model_args.n_heads
    dim = getattr(model_args, "head_dim", None) or model_args.dim // heads
    qk, v = dim, dim
    if hasattr(model_args, "v_head_dim"):
        qk, v = model_args.qk_nope_head_dim + model_args.qk_rope_head_dim, model_args.v_head_dim
    moe = experts_of(model_args)
    hidden = getattr(model_args, "moe_inter_dim", model_args.dim)  # llama4's is a multiple of 256
    return machine.Sizes(
        dim=model_args.dim,
        heads=heads,
        kv_heads=getattr(model_args, "n_kv_heads", None) or heads,
        qk_head_dim=qk,
        v_head_dim=v,
        vocabulary=model_args.vocab_size,
        experts=None if moe is None else machine.Experts(moe.num_experts, moe.top_k, hidden),
    )


def experts_of(model_args: Any) -> Any:
    """The sizes of a model's experts; None for dense models, of which qwen3's have sizes too, but switched off."""
    return getattr(model_args, "moe_args", None) if getattr(model_args, "moe_enabled", True) else None


def check_expert_mesh(config: Any, world_size: int) -> None:
    """Raises UsageError where experts are shared without FSDP: for these models TorchTitan asks for FSDP's mesh, which
    there is not then."""
    degree, fsdp = config.parallelism.expert_parallel_degree, checks.fsdp_processes(config.parallelism, world_size)
    if degree > 1 and fsdp == 1 and config.model.name in ("deepseek_v3", "llama4"):
        raise UsageError(
            f"[parallelism] expert_parallel_degree {degree}: TorchTitan 0.2's {config.model.name} shares experts only "
            f"beside FSDP or context parallelism, and none of {world_size} processes are left for these; set it to 1"
        )


def check_job(job_config: Any, parallel_dims: Any, choices: FlashMoE) -> None:
    """Raises UsageError for a job that stock TorchTitan or this swap is known not to run."""
    from torchtitan.protocols.train_spec import get_train_spec

    model_args = get_train_spec(job_config.model.name).model_args[job_config.model.flavor]
    attention_type = getattr(model_args, "attn_type", "sdpa")
    if choices.attention == "flashmoe":
        _check_attention(job_config, attention_type, parallel_dims)
    elif (
        attention_type == "flex"
        and not torch.cuda.is_available()
        and not job_config.checkpoint.create_seed_checkpoint  # which trains nothing
    ):
        raise UsageError("stock attention cannot train with document masks on a CPU (flex attention has no backward)")
    if "float8" in " ".join(job_config.model.converters):
        raise UsageError("converter 'flashmoe' does not work beside float8 converters; leave one of them out")
    for entry in versions.broken("torchtitan", Version(importlib.metadata.version("torch"))):
        if set(entry["features"]) <= features(job_config, parallel_dims):
            pair = f"torchtitan {entry['version']} with torch {entry['torch']}"
            what = " + ".join(entry["features"])
            raise UsageError(f"{pair} cannot run {what}: {entry['why']}. {entry['instead']}")


def _check_attention(job_config: Any, attention_type: str, parallel_dims: Any) -> None:
    if parallel_dims.cp_enabled:
        context.check(job_config, parallel_dims)
    if parallel_dims.pp_enabled and attention_type != "sdpa":
        raise UsageError("pipeline parallelism cannot split document masks into microbatches; choose one of the two")


def features(job_config: Any, parallel_dims: Any) -> set[str]:
    """What of TorchTitan a job uses, in the names of versions.toml."""
    checkpointing = job_config.activation_checkpoint
    used = {
        "tensor parallelism": parallel_dims.tp_enabled,
        "pipeline parallelism": parallel_dims.pp_enabled,
        "expert parallelism": parallel_dims.ep_enabled,
        "compile": job_config.compile.enable and "model" in job_config.compile.components,
        "selective op checkpointing": checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op",
    }
    return {name for name, on in used.items() if on}


def provide_validator(job_config: Any) -> None:
    """Lets `[validation]` work for models that TorchTitan gives no validator (deepseek_v3): it is the same for all."""
    from torchtitan.components.validate import build_validator
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

    name = job_config.model.name
    spec = get_train_spec(name)
    if job_config.validation.enable and spec.build_validator_fn is None:
        register_train_spec(name, dataclasses.replace(spec, build_validator_fn=build_validator))


def ask_for_no_masks(trainer: Any) -> None:
    """TorchTitan's validator asks every model for attention masks and takes a TypeError for "I need none"; deepseek_v3
    builds masks even for the attention that accepts none. Training asks only where the configuration has masks."""
    if getattr(trainer.model_args, "attn_type", "sdpa") != "sdpa":
        return

    def no_masks(*args: Any, **kwargs: Any) -> None:
        raise TypeError("this attention takes no masks")

    for model in trainer.model_parts:
        model.get_attention_masks = no_masks
