"""Attention by PyTorch's own kernels, for GPUs and cases that have none of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe_train.ops.attention.checks import check


def fallback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """The same function by PyTorch's scaled_dot_product_attention, for GPUs and cases without a kernel of ours.

    Full and square causal attention take PyTorch's fused kernels, cuDNN's first; windows, documents and rectangular
    causal attention need a dense boolean mask `[S, T]`.
    """
    heads, groups = check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    length_q, length_k = q.shape[2], k.shape[2]
    full = cu_seqlens_q is None and window_left < 0 and window_right < 0
    causal = cu_seqlens_q is None and window_left < 0 and window_right == 0 and length_q == length_k
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(fused, set_priority=True):
        if full or causal:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=heads != groups
            )
        else:
            visible = _visible(q, length_q, length_k, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
            k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
            # SDPA's kernels disagree on rows that see nothing: let such a row see everything, then zero its output.
            seeing = visible.any(-1, keepdim=True)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~seeing, scale=softmax_scale)
            out = out.masked_fill(~seeing, 0.0)
    return out.transpose(1, 2)


def _visible(
    q: Tensor,
    length_q: int,
    length_k: int,
    left: int,
    right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """The boolean mask `[S, T]` of the pairs that see each other, computed on the device without a host sync."""
    i = torch.arange(length_q, device=q.device)[:, None]
    j = torch.arange(length_k, device=q.device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        visible = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device)
        shift: int | Tensor = length_k - length_q
    else:
        document_q, document_k = (
            torch.bucketize(x, cu, right=True) for x, cu in ((i, cu_seqlens_q), (j, cu_seqlens_k))
        )
        documents = cu_seqlens_q.shape[0] - 1
        visible = (document_q == document_k) & (document_q <= documents)  # rows past the last bound: in no document
        ends = document_q.clamp(max=documents)
        shift = cu_seqlens_k[ends] - cu_seqlens_q[ends]
    distance = j - (i + shift)
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    return visible
