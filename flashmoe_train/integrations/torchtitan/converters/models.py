"""A recipe's `[model]` as one of TorchTitan's: the framework-neutral sizes in the arguments of its model classes."""

import dataclasses
from typing import Any

from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import checks
from flashmoe_train.schema import Model

FLAVOR = "recipe"  # the flavor under which `register` adds the model of this process' recipe


def register(model: Model, document_masks: bool, exact: bool) -> tuple[str, str]:
    """Adds the model to TorchTitan's; returns its `[model] name` and `flavor`.

    `exact`: experts that are left stock compute in float32; their grouped products would round it to bfloat16.
    """
    name, flavors, build = {
        "llama3": ("llama3", llama3_args, _llama3),
        "qwen3_moe": ("qwen3", qwen3_args, _qwen3_moe),
        "deepseek_v3": ("deepseek_v3", deepseekv3_args, _deepseek_v3),
    }[model.architecture]
    arguments: Any = build(model)
    if document_masks:
        arguments = dataclasses.replace(arguments, attn_type="flex", attn_mask_type="block_causal")
    if exact and model.moe is not None:
        arguments.moe_args.use_grouped_mm = False
    flavors[FLAVOR] = arguments
    return name, FLAVOR


def heads(adapter: Any) -> tuple[int, int]:
    """Query and key/value heads of the model whose weights an adapter renames."""
    arguments = adapter.model_args
    return arguments.n_heads, getattr(arguments, "n_kv_heads", None) or arguments.n_heads


def _common(model: Model) -> dict[str, Any]:
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_hidden_layers,
        "n_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
    }


def _llama3(model: Model) -> TransformerModelArgs:
    head_dim = model.hidden_size / model.num_attention_heads
    if model.head_dim not in (None, head_dim):
        raise UsageError(f"[model] head_dim = {model.head_dim}: in TorchTitan's llama3 it is hidden_size / heads")
    return TransformerModelArgs(
        **_common(model),
        n_kv_heads=model.num_key_value_heads,
        # TorchTitan computes the width: so much of 8/3 hidden_size, rounded up to a multiple. This gives ours exactly.
        ffn_dim_multiplier=model.intermediate_size / int(8 * model.hidden_size / 3),
        multiple_of=model.intermediate_size,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0)  # which scales nothing
        if model.rope_scaling is None
        else RoPEScalingArgs(
            scaling_factor=model.rope_scaling.factor,
            **model.rope_scaling.model_dump(exclude={"rope_type", "factor"}),
        ),
    )


def _qwen3_moe(model: Model) -> Qwen3ModelArgs:
    moe = model.moe
    assert moe is not None
    if moe.first_k_dense_replace:
        raise UsageError("[model.moe] first_k_dense_replace: every layer of TorchTitan's qwen3 has experts")
    return Qwen3ModelArgs(
        **_common(model),
        n_kv_heads=model.num_key_value_heads or model.num_attention_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        hidden_dim=model.intermediate_size,
        moe_enabled=True,
        moe_inter_dim=moe.moe_intermediate_size,
        moe_args=_experts(model),
    )


def _deepseek_v3(model: Model) -> DeepSeekV3ModelArgs:
    moe, mla, yarn = model.moe, model.mla, model.rope_scaling
    assert moe is not None and mla is not None
    checks.check_latent(mla)
    scaling: dict[str, Any] = {"rope_factor": 1.0, "mscale": 1.0}  # which scale nothing
    if yarn is not None:
        scaling = yarn.model_dump(exclude={"rope_type", "factor", "original_max_position_embeddings"})
        scaling |= {"rope_factor": yarn.factor, "original_seq_len": yarn.original_max_position_embeddings}
    return DeepSeekV3ModelArgs(
        **_common(model),
        inter_dim=model.intermediate_size,
        n_dense_layers=moe.first_k_dense_replace,
        moe_inter_dim=moe.moe_intermediate_size,
        moe_args=_experts(model),
        **mla.model_dump(),
        **scaling,
    )


def _experts(model: Model) -> MoEArgs:
    moe = model.moe
    assert moe is not None
    return MoEArgs(
        num_experts=moe.num_experts,
        num_shared_experts=moe.n_shared_experts,
        score_func=moe.scoring_func,
        route_norm=moe.norm_topk_prob,
        route_scale=moe.routed_scaling_factor,
        score_before_experts=False,
        top_k=moe.num_experts_per_tok,
        num_expert_groups=moe.n_group,
        num_limited_groups=moe.topk_group,
    )
