"""Attention by PyTorch's own kernels, for GPUs and cases that have none of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from flashmoe_train.ops.library import no_autocast

_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    band: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """`flashmoe_train.attention` after its checks, with window_left and window_right as `band`.

    Full and square causal attention run scaled_dot_product_attention, cuDNN's kernel first; documents on a GPU run
    varlen_attn. Everything else (windows, rectangular causal attention) needs a dense boolean mask `[S, T]`, behind
    which a NaN in a hidden key still reaches the rows of its sequence: 0 · NaN. So does `deterministic`, for which
    PyTorch's plain matrix products serve.
    """
    if isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor):
        return _on_shards(q, k, v, softmax_scale, band, cu_seqlens_q, cu_seqlens_k, deterministic)
    with no_autocast(q.device.type):  # the result has q's dtype, as the operator's has
        if softmax_scale <= 0:  # the fused kernels multiply masked scores, -inf, by it
            q, softmax_scale = (-q, -softmax_scale) if softmax_scale < 0 else (q * 0.0, 1.0)
        if cu_seqlens_q is not None and cu_seqlens_k is not None and not deterministic and _varlen_takes(q, v):
            return _packed(q, k, v, softmax_scale, band, cu_seqlens_q, cu_seqlens_k)
        heads, groups = q.shape[2], k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        square = q.shape[2] == k.shape[2]
        # The fused kernels fail on empty tensors.
        kernels = _FUSED if q.numel() and k.numel() and not deterministic else [SDPBackend.MATH]
        with sdpa_kernel(kernels, set_priority=True):
            if cu_seqlens_q is None and (band == (-1, -1) or (band == (-1, 0) and square)):
                causal = band == (-1, 0)
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=heads != groups
                )
                return out.transpose(1, 2)
            visible = _visible(q, q.shape[2], k.shape[2], *band, cu_seqlens_q, cu_seqlens_k)
            k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
            # SDPA's kernels disagree on rows that see nothing: let such a row see everything, then zero its output.
            seeing = visible.any(-1, keepdim=True)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~seeing, scale=softmax_scale)
            return out.masked_fill(~seeing, 0.0).transpose(1, 2)


def _on_shards(
    q: DTensor,
    k: DTensor,
    v: DTensor,
    softmax_scale: float,
    band: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """PyTorch has no sharding rules for all of these kernels: every device attends over its own batch or heads, and
    over everything where q is sharded otherwise."""
    mesh = q.device_mesh
    free = (Replicate(), *([Shard(0)] if cu_seqlens_q is None else []))
    free += (Shard(2),) if k.shape[2] % mesh.size() == 0 else ()
    placements = q.placements if all(p in free for p in q.placements) else [Replicate()] * mesh.ndim
    local_q, local_k, local_v = (x.redistribute(placements=placements).to_local() for x in (q, k, v))
    cu_q, cu_k = (x.full_tensor() if isinstance(x, DTensor) else x for x in (cu_seqlens_q, cu_seqlens_k))
    out = attention(local_q, local_k, local_v, softmax_scale, band, cu_q, cu_k, deterministic)
    return DTensor.from_local(out.contiguous(), mesh, placements, run_check=False)


def _varlen_takes(q: Tensor, v: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and max(q.shape[3], v.shape[3]) <= 256
        and q.numel() > 0
        and v.numel() > 0
    )


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    band: tuple[int, int],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Tensor:
    """Documents by varlen_attn, which wants equal heads and dims (a multiple of 8) and writes nothing, gradients
    included, in rows of no document: those are masked on both sides."""
    heads, dim_v = q.shape[2], v.shape[3]
    width = -max(q.shape[3], dim_v) % 8 + max(q.shape[3], dim_v)

    def rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x.squeeze(0).repeat_interleave(heads // x.shape[2], dim=1)
        return torch.where(in_document(x, cu_seqlens), F.pad(x, (0, width - x.shape[2])), 0.0)

    out = varlen_attn(
        rows(q, cu_seqlens_q),
        rows(k, cu_seqlens_k),
        rows(v, cu_seqlens_k),
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[1],  # the longest document may be as long as all: reading its length would wait for the device
        k.shape[1],
        scale=softmax_scale,
        window_size=band,
    )
    assert isinstance(out, Tensor)
    return torch.where(in_document(out, cu_seqlens_q), out, 0.0)[None, ..., :dim_v]


def in_document(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S, 1, 1]: the rows of x that lie before the end of the last document."""
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1])[:, None, None]


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
