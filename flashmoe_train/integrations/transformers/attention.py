"""`attn_implementation="flashmoe"`: Transformers' attention by `flashmoe_train.attention`.

Shape legend: B batch, S sequence, H query heads, G key/value heads, D dim of q and k, V dim of v.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flashmoe_train.integrations.sdpa import Visible, attend
from flashmoe_train.integrations.transformers.masks import CausalMask, warn_stock
from flashmoe_train.ops.library import compute_dtype

# What some models' attention adds to softmax(q kᵀ) v, and ours has not.
_FOREIGN = {
    "softcap": "a cap on scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on scores",
    "cache": "a paged cache",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CausalMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls in every layer: query `[B, H, S, D]`, key `[B, G, S, D]`, value `[B, G, S, V]`.

    Returns `[B, S, H, V]`, in the dtype of autocast where that is on, and no weights. Padding gets zeros. With a mask
    that is no CausalMask Transformers' own sdpa computes, and a warning says so. Raises ValueError that names what was
    found for what neither may ignore: dropout, sinks, a cap or bias on scores, lengths that are not the mask's.
    """
    if not isinstance(attention_mask, CausalMask):
        if query.shape[2] == key.shape[2]:  # otherwise whoever made the mask has said so
            warn_stock("the mask was made elsewhere, or is no causal one")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    for name, what in _FOREIGN.items():
        if others.get(name) is not None:
            raise ValueError(f"flashmoe attention has not {what}: {name} must be None in {type(module).__name__}")
    if dropout:
        raise ValueError(f"flashmoe attention has no dropout, found {dropout} in {type(module).__name__}")
    if is_causal is False:
        raise ValueError(f"the mask is causal, but {type(module).__name__} asks for is_causal=False")
    if others.get("output_attentions"):
        text = "no weights: output_attentions=True asks for the attention weights, which nobody but eager holds"
        warnings.warn(f"flashmoe attention gives {text}", stacklevel=2)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"the mask is of as many queries as keys, found {query.shape[2]} and {key.shape[2]}")
    dtype = compute_dtype(query)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    bounds_q, bounds_k = attention_mask.cu_seqlens_q, attention_mask.cu_seqlens_k
    if bounds_q is None and others.get("cu_seq_lens_q") is not None:  # as flash_attention_2 has them
        bounds_q, bounds_k = (_bounds(others[f"cu_seq_lens_{side}"]) for side in "qk")
    window = (None if attention_mask.window is None else attention_mask.window - 1, 0)
    return attend(q, k, v, Visible(window, bounds_q, bounds_k), scaling), None


def _bounds(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.to(torch.int32)
