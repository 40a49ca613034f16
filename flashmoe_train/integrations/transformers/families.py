"""Transformers' families that are known here: why one is left alone, and a small model of each for
`flashmoe swap-check`, the tests and the table of the documents. Imports nothing of Transformers."""

from typing import Any, NamedTuple

MINIMUM = "5.17"  # of transformers: its masks and experts are asked for in another way before


class Family(NamedTuple):
    """One architecture; `sizes` make its configuration small, keeping every mechanism that it has, in head dims that
    our kernels are compiled for."""

    title: str
    model_type: str
    attention: str  # class name
    sizes: dict[str, Any]
    attention_why_not: str | None = None


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # so that attention and experts matter to the result
}
_HEADS = {"head_dim": 64}  # not hidden_size / heads: who confuses them is found out
_ROUTED = {"num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
}

FAMILIES = (
    Family("Llama", "llama", "LlamaAttention", _SMALL | _HEADS),
    Family("Mistral (sliding window)", "mistral", "MistralAttention", _SMALL | _HEADS | {"sliding_window": 8}),
    Family(
        "Qwen3 (full and sliding layers)",
        "qwen3",
        "Qwen3Attention",
        _SMALL | _HEADS | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    Family(
        "Qwen3-MoE",
        "qwen3_moe",
        "Qwen3MoeAttention",
        _SMALL | _HEADS | _ROUTED | {"num_experts": 8, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    Family("Mixtral", "mixtral", "MixtralAttention", _SMALL | _HEADS | _ROUTED | {"num_local_experts": 4}),
    Family(
        "OLMoE",
        "olmoe",
        "OlmoeAttention",
        _SMALL | _ROUTED | {"hidden_size": 256, "num_experts": 8, "intermediate_size": 24},
    ),
    Family("DeepSeek-V3", "deepseek_v3", "DeepseekV3Attention", _SMALL | _ROUTED | _LATENT),
    Family(
        "gpt-oss",
        "gpt_oss",
        "GptOssAttention",
        _SMALL | _HEADS | _ROUTED | {"num_local_experts": 4, "sliding_window": 8},
        "it has attention sinks, which our operator has not",
    ),
)
ATTENTION = {family.attention: family.attention_why_not for family in FAMILIES}
