"""Megatron's core attention on `flashmoe_train.attention`.

Shape legend: S sequence, B batch, H query heads of this process, G key/value heads, D dim of queries and keys, V of
values, T tokens of packed sequences.
"""

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import checks
from flashmoe_train.ops.attention import attention

_MASKS = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.no_mask)


class FlashMoEAttention(MegatronModule):
    """In place of DotProductAttention, in `core_attention` of a layer's specification; without parameters.

    Takes q `[S, B, H, D]`, k `[S, B, G, D]` and v `[S, B, G, V]` as Megatron has them, which are often views of one
    tensor: with the batch moved to the front they are read where they lie. Gives `[S, B, H · V]`. Packed sequences
    (`qkv_format="thd"`) are `[T, heads, dim]` and give `[T, H · V]`. The mask is what `attn_mask_type` says, within the
    window of the configuration: the tensor `attention_mask` may be None and is not read.

    Raises UsageError for what it cannot compute: dropout, other masks than causal and none, an additive bias.
    """

    takes_place_of = "DotProductAttention"

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        checks.attention(config, attention_dropout)
        self.attn_mask_type = attn_mask_type
        head_dim = config.kv_channels if k_channels is None else k_channels
        # apply_query_key_layer_scaling divides before stock's softmax, for float16's range, and multiplies within it.
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.window: tuple[int | None, int | None] = (None, None)
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            left, right = config.window_size
            self.window = (None if left < 0 else left, None if right < 0 else right)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if attention_bias is not None:
            raise UsageError("swapped attention has no attention_bias: it must be None")
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if kind not in _MASKS:
            allowed = ", ".join(mask.name for mask in _MASKS)
            raise UsageError(f"swapped attention takes an attn_mask_type of {allowed}, found {kind.name}")
        options: dict[str, Any] = {
            "causal": kind != AttnMaskType.no_mask,
            "softmax_scale": self.softmax_scale,
            "window": self.window,
        }
        if packed_seq_params is not None:
            documents = _documents(packed_seq_params, options["causal"])
            return attention(query, key, value, **options, **documents).flatten(1)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        # Megatron's next product wants [S, B, H · V]; that of one sequence is a view.
        return attention(q, k, v, **options).transpose(0, 1).flatten(2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        return {}  # as stock's, which has parameters for attention sinks only


def _documents(packed: Any, causal: bool) -> dict[str, Any]:
    """Where each of several packed sequences begins. Padding between two belongs to the end of the first, where causal
    queries do not see it."""
    if packed.qkv_format != "thd":
        raise UsageError(f"packed_seq_params must have qkv_format 'thd', found {packed.qkv_format!r}")
    if getattr(packed, "local_cp_size", None) not in (None, 1):
        raise UsageError("packed sequences with context parallelism: swapped attention has none")
    if packed.cu_seqlens_kv_padded is not None and not causal:
        raise UsageError("padded packed sequences need a causal mask: without one, tokens would see the padding")
    padded_q, padded_kv = packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded
    return {
        "cu_seqlens_q": packed.cu_seqlens_q if padded_q is None else padded_q,
        "cu_seqlens_k": packed.cu_seqlens_kv if padded_kv is None else padded_kv,
    }
