"""Models as Hugging Face's Transformers know them: the `config.json` that goes with exported weights."""

from typing import Any

from flashmoe_train.errors import UsageError
from flashmoe_train.schema import Model


def config(model: Model, seq_len: int, dtype: str, special_tokens: dict[str, int]) -> dict[str, Any]:
    """The content of `config.json` for a model that was trained on sequences of `seq_len` tokens.

    DeepSeek models whose router has softmax scores are "deepseek_v2" there. That has no correction bias: what balancing
    the experts' load has added to it is in the exported weights, and Transformers leaves it aside.
    """
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **special_tokens,
    }
    if scaling := _rope_scaling(model, seq_len):
        common["rope_scaling"] = scaling
    match model.architecture:
        case "llama3":
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common}
        case "qwen3_moe":
            return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **common, **_qwen3_moe(model)}
    version = "3" if model.moe is not None and model.moe.scoring_func == "sigmoid" else "2"
    kind = {"architectures": [f"DeepseekV{version}ForCausalLM"], "model_type": f"deepseek_v{version}"}
    return {**kind, **common, **_deepseek(model)}


def check(model: Model) -> None:
    """Raises UsageError if Transformers has no model that computes the same."""
    moe = model.moe
    if moe is None:
        return
    if model.architecture == "qwen3_moe":
        unknown = {
            "n_shared_experts": moe.n_shared_experts != 0,
            "scoring_func": moe.scoring_func != "softmax",
            "routed_scaling_factor": moe.routed_scaling_factor != 1,
            "n_group": moe.n_group is not None,
        }
    elif moe.scoring_func == "softmax":  # deepseek_v2
        unknown = {"norm_topk_prob": moe.norm_topk_prob, "n_group": moe.n_group is not None}
    else:
        unknown = {}
    for key in (key for key, set_ in unknown.items() if set_):
        value = getattr(moe, key)
        kind = f"{model.architecture} with {moe.scoring_func} scores"
        raise UsageError(f"[checkpoint] export: Transformers' {kind} has no [model.moe] {key} = {value!r}")


def _rope_scaling(model: Model, seq_len: int) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "llama3":
        return scaling.model_dump()
    if seq_len <= scaling.original_max_position_embeddings:
        return None  # YaRN was not at work
    return scaling.model_dump() | {"mscale_all_dim": scaling.mscale}  # this one scales the logits


def _qwen3_moe(model: Model) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    return {
        "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _deepseek(model: Model) -> dict[str, Any]:
    moe, mla = model.moe, model.mla
    assert moe is not None and mla is not None
    sizes = moe.model_dump(exclude={"num_experts"}) | mla.model_dump() | {"n_routed_experts": moe.num_experts}
    sizes |= {"q_lora_rank": mla.q_lora_rank or None, "rope_interleave": True}
    if moe.n_group is None:
        sizes |= {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    else:
        sizes |= {"topk_method": "noaux_tc"}
    return sizes
