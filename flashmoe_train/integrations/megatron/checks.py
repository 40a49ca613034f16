"""What our parts of a Megatron model cannot compute, and what Megatron itself cannot or does wrongly: refused here."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from flashmoe_train.errors import UsageError
from flashmoe_train.ops.expert_parallel import ExchangeCase, supports
from flashmoe_train.ops.library import capability
from flashmoe_train.schema import Model

_Reason = tuple[bool, str]


def attention(config: Any, dropout: float | None = None) -> None:
    """Raises UsageError unless swapped attention computes what the TransformerConfig asks for."""
    dropout = config.attention_dropout if dropout is None else dropout
    _refuse(
        "swapped attention",
        [
            (config.context_parallel_size > 1, "context_parallel_size > 1: there is no context parallelism yet"),
            (dropout > 0, f"attention_dropout = {dropout}: it has none, set 0.0"),
            (
                config.softmax_type != "vanilla",
                f"softmax_type = {config.softmax_type!r}: it is the 'vanilla' one",
            ),
            (bool(config.experimental_attention_variant), "experimental_attention_variant: it has none"),
            (config.qk_clip, "qk_clip: it does not keep the largest logits"),
            (config.fp8_dot_product_attention or config.fp8_multi_head_attention, "fp8: it has no such kernel"),
        ],
    )


def parallelism(config: Any) -> None:
    """Raises UsageError for what Megatron trains without an error and wrongly."""
    tensor, of_experts = config.tensor_model_parallel_size, config.expert_tensor_parallel_size
    if config.num_moe_experts and config.expert_model_parallel_size == 1 and of_experts not in (None, tensor):
        raise UsageError(
            f"expert_tensor_parallel_size = {of_experts} with tensor_model_parallel_size = {tensor} and no expert "
            "parallelism: Megatron does not sum the experts' gradients over all processes with other tokens, and their "
            f"experts drift apart; set expert_tensor_parallel_size = {tensor}, or expert_model_parallel_size > 1"
        )


def heads(tensor: int, model: Model) -> None:
    """Raises UsageError for what Megatron's configuration would refuse in words of its own, or building the model."""
    for name, size in (("num_attention_heads", model.num_attention_heads), ("vocab_size", model.vocab_size)):
        if size % tensor:
            raise UsageError(f"[parallel] tensor = {tensor} does not divide [model] {name} ({size})")
    groups = model.num_key_value_heads or tensor
    if groups % tensor and tensor % groups:
        what = f"neither divides nor is a multiple of [model] num_key_value_heads ({groups})"
        raise UsageError(f"[parallel] tensor = {tensor} {what}")


def widths(config: Any, model: Model, seq_len: int) -> None:
    """Raises UsageError for sizes that tensor parallelism cannot cut, which Megatron finds when it builds the model or
    trains."""
    tensor, moe, mla = config.tensor_model_parallel_size, model.moe, model.mla
    of_experts = config.expert_tensor_parallel_size or tensor
    cut: list[tuple[str, int, int]] = []
    if moe is None or moe.first_k_dense_replace:
        cut.append(("[model] intermediate_size", config.ffn_hidden_size, tensor))
    if moe is not None:
        cut.append(("[model.moe] moe_intermediate_size", config.moe_ffn_hidden_size, of_experts))
        shared = config.moe_shared_expert_intermediate_size or 0
        cut.append(("the width of shared experts", shared, tensor))
    if mla is not None:
        cut.append(("[model.mla] q_lora_rank", mla.q_lora_rank, tensor))
        cut.append(("[model.mla] kv_lora_rank + qk_rope_head_dim", mla.kv_lora_rank + mla.qk_rope_head_dim, tensor))
    if config.sequence_parallel:
        cut.append(("[training] seq_len", seq_len, tensor))
    for name, size, degree in cut:
        if size % degree:
            says = "[parallel] tensor" if degree == tensor else "[megatron] expert_tensor_parallel_size"
            raise UsageError(f"{says} = {degree} does not divide {name} ({size})")


def experts(config: Any) -> None:
    """Raises UsageError unless swapped experts compute what the TransformerConfig asks for."""
    parallelism(config)
    swiglu = config.gated_linear_unit and config.activation_func is F.silu
    altered = config.activation_func_clamp_value is not None or config.glu_linear_offset != 0
    _refuse(
        "swapped experts",
        [
            (not swiglu, "they are SwiGLU: gated_linear_unit = true with activation_func = silu"),
            (altered, "activation_func_clamp_value, glu_linear_offset: their SwiGLU has neither"),
            (config.add_bias_linear, "add_bias_linear = true: they have no bias"),
            (bool(config.fp8 or config.fp4), "fp8, fp4: they have no such kernels"),
            (config.moe_latent_size is not None, "moe_latent_size: they work in the model's own dim"),
            (config.moe_apply_probs_on_input, "moe_apply_probs_on_input: they multiply within"),
        ],
    )


def dispatch(config: Any) -> None:
    """Raises UsageError unless processes can share the experts of the TransformerConfig by our exchange."""
    what = 'dispatch = "flashmoe"'
    tensor = config.expert_tensor_parallel_size
    _refuse(
        what,
        [
            (tensor not in (None, 1), f"expert_tensor_parallel_size = {tensor}: each expert is one process', set 1"),
            (config.moe_token_dispatcher_type == "flex", 'moe_token_dispatcher_type = "flex": it is another exchange'),
            (config.moe_pad_expert_input_to_capacity, "moe_pad_expert_input_to_capacity: it does not pad experts"),
            (config.moe_shared_expert_overlap, "moe_shared_expert_overlap: it overlaps nothing yet"),
            (config.overlap_moe_expert_parallel_comm, "overlap_moe_expert_parallel_comm: it overlaps nothing yet"),
            (config.delay_wgrad_compute, "delay_wgrad_compute: tokens are not kept for it"),
        ],
    )
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = config.hidden_size, config.moe_ffn_hidden_size, config.num_moe_experts, config.expert_model_parallel_size
    if (reason := supports(ExchangeCase(device, capability(device), dtype, *sizes))) is not None:
        raise UsageError(f'{what}: {reason}; "stock" runs')


def _refuse(what: str, reasons: Iterable[_Reason]) -> None:
    if found := [reason for wrong, reason in reasons if wrong]:
        raise UsageError(f"{what}: {'; '.join(found)}")
