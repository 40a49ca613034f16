"""A recipe's `[model]` in Megatron's words: framework-neutral sizes as arguments of TransformerConfig and GPTModel."""

import dataclasses
from typing import Any

import torch.nn.functional as F

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.sizes import Experts, Sizes
from flashmoe_train.schema import Model


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Of a model's classes."""

    latent: bool  # MLATransformerConfig instead of TransformerConfig
    config: dict[str, Any]
    model: dict[str, Any]  # GPTModel's


def arguments(model: Model, seq_len: int) -> Arguments:
    """What Megatron is told to build the model, for sequences of that length. Raises UsageError for what it has not."""
    config: dict[str, Any] = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "layernorm_epsilon": model.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }
    gpt: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "max_sequence_length": seq_len,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    if model.mla is None:
        config |= {
            "num_query_groups": model.num_key_value_heads or model.num_attention_heads,
            "kv_channels": _head_dim(model),
            "qk_layernorm": model.architecture == "qwen3_moe",
        }
        gpt |= {"rotary_base": model.rope_theta, **_llama3_scaling(model)}
    else:
        config |= _latent(model, seq_len)
    if model.moe is not None:
        config |= _experts(model)
    return Arguments(model.mla is not None, config, gpt)


def sizes(model: Model) -> Sizes:
    """What our operators want to know of it."""
    mla, moe = model.mla, model.moe
    return Sizes(
        dim=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads or model.num_attention_heads,
        qk_head_dim=_head_dim(model) if mla is None else mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        v_head_dim=_head_dim(model) if mla is None else mla.v_head_dim,
        vocabulary=model.vocab_size,
        experts=None if moe is None else Experts(moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size),
    )


def _head_dim(model: Model) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


# Megatron has these in its code.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama3_scaling(model: Model) -> dict[str, Any]:
    if model.rope_scaling is None:
        return {}
    scaling = model.rope_scaling.model_dump()
    for key, value in _LLAMA3.items():
        if scaling[key] != value:
            raise UsageError(f"[model.rope_scaling] {key} = {scaling[key]}: in Megatron it is {value}")
    return {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}


def _latent(model: Model, seq_len: int) -> dict[str, Any]:
    mla, yarn = model.mla, model.rope_scaling
    assert mla is not None
    config = {
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "kv_channels": mla.v_head_dim,
        "qk_layernorm": True,  # of the latents
        "rotary_base": model.rope_theta,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,  # it scales logits of "rope" too
    }
    if yarn is not None and yarn.rope_type == "yarn" and seq_len > yarn.original_max_position_embeddings:
        config |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
        }
    return config


def _experts(model: Model) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    if moe.scoring_func == "sigmoid" and moe.num_experts_per_tok > 1 and not moe.norm_topk_prob:
        raise UsageError("[model.moe] norm_topk_prob = false: Megatron divides sigmoid scores by their sum")
    config: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_ffn_hidden_size": moe.moe_intermediate_size,
        "moe_router_score_function": moe.scoring_func,
        # A softmax over the chosen experts' logits is one over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": moe.scoring_func == "softmax" and not moe.norm_topk_prob,
        "moe_layer_freq": [int(i >= moe.first_k_dense_replace) for i in range(model.num_hidden_layers)],
    }
    if moe.routed_scaling_factor != 1.0:
        config["moe_router_topk_scaling_factor"] = moe.routed_scaling_factor
    if moe.n_shared_experts:
        config["moe_shared_expert_intermediate_size"] = moe.n_shared_experts * moe.moe_intermediate_size
    if moe.n_group is not None and moe.topk_group is not None:
        # DeepSeek's groups are chosen by the sum of their two best experts.
        if moe.num_experts_per_tok // moe.topk_group != 2:
            raise UsageError(
                f"[model.moe] topk_group = {moe.topk_group}: Megatron chooses groups by the sum of their best "
                f"num_experts_per_tok / topk_group experts, which has to be 2, found {moe.num_experts_per_tok} / "
                f"{moe.topk_group}"
            )
        config |= {"moe_router_num_groups": moe.n_group, "moe_router_group_topk": moe.topk_group}
    return config
