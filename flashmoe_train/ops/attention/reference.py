"""Attention in plain mathematics, a chunk of queries at a time: what the operator runs on the CPU."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flashmoe_train.ops.attention.checks import check, check_backward
from flashmoe_train.ops.library import accumulation_dtype, segments

# Rows of scores held at a time: [B, H, 64, T] is what the reference needs beside its inputs and outputs. Small enough
# for a CPU's caches and to skip what a causal mask hides: at S = 256 it takes 0.45 times as long as 256 rows.
_CHUNK = 64


def _documents(x: Tensor, cu_seqlens: Tensor | None, name: str) -> list[tuple[int, int]]:
    """(begin, end) of each document in x's sequence dimension."""
    return [(0, x.shape[1])] if cu_seqlens is None else segments(name, cu_seqlens, x.shape[1])


def _chunks(
    q: Tensor, k: Tensor, left: int, right: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yields (queries, keys, hidden): a chunk of queries, the keys that any of them sees, and the mask `[queries,
    keys]` of the pairs that do not see each other (None: all do). Chunks that see nothing are left out."""
    documents_q = _documents(q, cu_seqlens_q, "cu_seqlens_q")
    documents_k = _documents(k, cu_seqlens_k, "cu_seqlens_k")
    for (q0, q1), (k0, k1) in zip(documents_q, documents_k, strict=True):
        shift = k1 - q1  # query i stands at key i + shift: the last query at the last key
        for begin in range(q0, q1, _CHUNK):
            end = min(begin + _CHUNK, q1)
            first = k0 if left < 0 else max(k0, begin + shift - left)
            last = k1 if right < 0 else min(k1, end + shift + right)
            if first >= last:
                continue
            distance = torch.arange(first, last, device=q.device) - (
                torch.arange(begin, end, device=q.device)[:, None] + shift
            )
            hidden = torch.zeros_like(distance, dtype=torch.bool)
            if left >= 0:
                hidden |= distance < -left
            if right >= 0:
                hidden |= distance > right
            yield slice(begin, end), slice(first, last), hidden if hidden.any() else None


def _by_group(x: Tensor, rows: slice, groups: int) -> Tensor:
    """Rows of `[B, S, H, D]` in accumulation precision as `[B, G, H/G · rows, D]`: the heads that share keys are
    stacked, so one matrix product serves a group."""
    x = x[:, rows].to(accumulation_dtype(x.dtype))
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _from_group(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_by_group`: `[B, G, H/G · rows, D]` to `[B, rows, H, D]`."""
    return x.unflatten(2, (heads // x.shape[1], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, softmax_scale: float, hidden: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * softmax_scale
    if hidden is not None:
        scores.unflatten(2, (-1, hidden.shape[0])).masked_fill_(hidden, -math.inf)
    return scores


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """The operator in plain mathematics: the oracle of the tests and what runs on the CPU.

    Returns out `[B, S, H, V]` in q's dtype and lse `[B, H, S]` in float32 (float64 for float64 inputs). Accumulates in
    lse's dtype and always repeats bitwise on the CPU.
    """
    heads, groups = check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    batch, length = q.shape[:2]
    out = q.new_zeros(batch, length, heads, v.shape[3])
    lse = q.new_full((batch, heads, length), -math.inf, dtype=accumulation_dtype(q.dtype))
    for rows, keys, hidden in _chunks(q, k, window_left, window_right, cu_seqlens_q, cu_seqlens_k):
        kc, vc = _by_group(k, keys, groups), _by_group(v, keys, groups)
        scores = _scores(_by_group(q, rows, groups), kc, softmax_scale, hidden)
        row_lse = scores.logsumexp(-1, keepdim=True)
        # A row that sees nothing has lse -inf; exp(-inf - 0) keeps its probabilities 0 instead of NaN.
        p = (scores - row_lse.masked_fill(row_lse == -math.inf, 0.0)).exp_()
        out[:, rows] = _from_group(p @ vc, heads).to(out.dtype)
        lse[:, :, rows] = _from_group(row_lse, heads).squeeze(-1).transpose(1, 2)
    return out, lse


def reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_forward`'s out with respect to q, k and v, in their dtypes."""
    heads, groups = check_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    for rows, keys, hidden in _chunks(q, k, window_left, window_right, cu_seqlens_q, cu_seqlens_k):
        qc, doc, oc = (_by_group(x, rows, groups) for x in (q, dout, out))
        kc, vc = _by_group(k, keys, groups), _by_group(v, keys, groups)
        row_lse = _by_group(lse.transpose(1, 2).unsqueeze(-1), rows, groups)
        p = (_scores(qc, kc, softmax_scale, hidden) - row_lse.masked_fill(row_lse == -math.inf, 0.0)).exp_()
        delta = (doc * oc).sum(-1, keepdim=True)  # Σ_j p_ij dp_ij
        ds = p * (doc @ vc.transpose(-1, -2) - delta) * softmax_scale
        dq[:, rows] = _from_group(ds @ kc, heads).to(dq.dtype)
        dk[:, keys] += (ds.transpose(-1, -2) @ qc).transpose(1, 2)
        dv[:, keys] += (p.transpose(-1, -2) @ doc).transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
