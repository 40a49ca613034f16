"""Exact softmax attention, forward and backward.

    out = softmax(softmax_scale · q kᵀ + mask) v            lse = log Σ exp(softmax_scale · q kᵀ + mask)

Tensors are `[B, S, H, D]`; only their last dimension has to be contiguous, so `[B, H, S, D]` and `[S, B, H, D]`
tensors are passed as views, never copied; `copies` names layouts that are. Shape legend:

    B batch    S queries    T keys    H query heads    G key/value heads (H % G == 0)    D dim of q, k    V dim of v

Every mask is a band per document: query i sees key j when `-window_left <= j - (i + T - S) <= window_right`, where a
negative window is unbounded. `window_right = 0` is causal, aligned to the bottom right (the last query sees all keys).
A row that sees no key has out = 0 and lse = -inf. With `cu_seqlens_*` (int32, `[documents + 1]`) B is 1 and the
sequence dimension is cut into documents that do not see each other; S and T above are then a document's own lengths.

Method: FlashAttention (Dao et al., 2022, arXiv:2205.14135; Dao, 2023, arXiv:2307.08691).
"""

import torch
from torch import Tensor

from flashmoe_train.ops.attention import fallback
from flashmoe_train.ops.attention.checks import (
    AttentionCase,
    check,
    check_window,
    copies,
    refused_by_kernel,
)
from flashmoe_train.ops.attention.operator import attention_forward
from flashmoe_train.ops.library import check_finite, has_kernel, reverse_mode_only

__all__ = ["AttentionCase", "attention", "copies", "supports"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Exact softmax attention with gradients for q, k and v.

    Args:
        q: queries `[B, S, H, D]`, floating point, last dimension contiguous.
        k: keys `[B, T, G, D]`, with H a multiple of G (grouped-query attention), same dtype and device as q.
        v: values `[B, T, G, V]`; V may differ from D.
        causal: query i sees keys up to `i + T - S` (bottom-right aligned), whatever the right side of `window`.
        softmax_scale: factor of q kᵀ; default `D ** -0.5`.
        window: how many keys to the left and right of its own position a query sees; None is unbounded.
        cu_seqlens_q: int32 `[documents + 1]`, first 0, not decreasing: where each document's queries begin in the
            packed sequence. q is then `[1, S, H, D]` or `[S, H, D]`, and so is the result. Documents may be empty.
        cu_seqlens_k: the same for keys; default `cu_seqlens_q`.
        deterministic: gradients are bitwise repeatable; default `torch.are_deterministic_algorithms_enabled()`.

    Returns:
        `[B, S, H, V]` in q's dtype; zeros where a query sees no key.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, shape, dtype, device or stride; the message names it.
            The values of cu_seqlens are checked on the CPU only: reading them would make a GPU wait.
        NotImplementedError: q, k or v carries a forward-mode tangent.

    Runs `torch.ops.flashmoe.attention_forward` where that has an implementation for the case (`supports`), otherwise
    PyTorch's kernels (`fallback`).
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    packed = cu_seqlens_q is not None and q.dim() == 3
    if packed:
        q, k, v = (x.unsqueeze(0) if x.dim() == 3 else x for x in (q, k, v))
    check_window(window)
    left, right = (-1 if side is None else side for side in window)
    check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    reverse_mode_only("attention", q, k, v)
    if causal:
        right = 0
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    check_finite("softmax_scale", softmax_scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if supports(AttentionCase.of(q, v, softmax_scale)) is None:
        out = attention_forward(q, k, v, softmax_scale, left, right, cu_seqlens_q, cu_seqlens_k, deterministic)[0]
    else:
        out = fallback.attention(q, k, v, softmax_scale, (left, right), cu_seqlens_q, cu_seqlens_k, deterministic)
    return out.squeeze(0) if packed else out


def supports(case: AttentionCase, *, complete: bool = False) -> str | None:
    """None if `torch.ops.flashmoe.attention_*` can run the case, else the reason why not.

    Of this installation, or of a `complete` one, which has the CUDA library.
    """
    if case.device_type in ("cpu", "meta"):
        return None
    if not has_kernel("attention_forward", case.device_type, complete):
        return f"this installation has no compiled attention kernel for device type {case.device_type!r}"
    return refused_by_kernel(case)
