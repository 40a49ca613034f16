"""`torch.ops.flashmoe.attention_forward` and `attention_backward`: schema, fake, autograd, FLOPs, sharding."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flashmoe_train.ops.attention.checks import check, check_backward
from flashmoe_train.ops.attention.reference import reference_backward, reference_forward
from flashmoe_train.ops.library import LIBRARY, TAGS, accumulation_dtype, differentiable_once, implement

_ARGUMENTS = (
    "float softmax_scale, SymInt window_left, SymInt window_right, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool deterministic"
)
LIBRARY.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=TAGS)
LIBRARY.define(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=TAGS,
)
attention_forward = torch.ops.flashmoe.attention_forward
attention_backward = torch.ops.flashmoe.attention_backward

implement("attention_forward", reference_forward, "CPU")
implement("attention_backward", reference_backward, "CPU")


@torch.library.register_fake("flashmoe::attention_forward", lib=LIBRARY)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int,
    right: int,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    det: bool,
) -> tuple[Tensor, Tensor]:
    heads, _ = check(q, k, v, cu_q, cu_k)
    batch, length = q.shape[:2]
    return (
        q.new_empty((batch, length, heads, v.shape[3])),
        q.new_empty((batch, heads, length), dtype=accumulation_dtype(q.dtype)),
    )


@torch.library.register_fake("flashmoe::attention_backward", lib=LIBRARY)
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, left: int, right: int,
    cu_q: Tensor | None, cu_k: Tensor | None, det: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_backward(dout, q, k, v, out, lse, cu_q, cu_k)
    # new_empty, not empty_like: the gradients are contiguous even where the inputs are transposed views.
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.softmax_scale, ctx.window_left, ctx.window_right, cu_seqlens_q, cu_seqlens_k, ctx.deterministic = (
        inputs
    )
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)


def _autograd(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grads = attention_backward(
        dout.contiguous(),  # out.sum().backward() gives a gradient whose strides are all 0
        q, k, v, out, lse, ctx.softmax_scale, ctx.window_left, ctx.window_right,
        cu_seqlens_q, cu_seqlens_k, ctx.deterministic,
    )  # fmt: skip
    return (*grads, *(None,) * 6)


torch.library.register_autograd("flashmoe::attention_forward", _autograd, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("attention_backward")


def visible_pairs(length_q: int, length_k: int, window_left: int, window_right: int) -> int:
    """How many (query, key) pairs one head of one document computes."""
    pairs = 0
    for i in range(length_q):
        position = i + length_k - length_q
        first = 0 if window_left < 0 else max(0, position - window_left)
        last = length_k if window_right < 0 else min(length_k, position + window_right + 1)
        pairs += max(0, last - first)
    return pairs


def _pairs(q_shape: torch.Size, k_shape: torch.Size, left: int, right: int) -> int:
    # Of packed documents only the total length is known here, so they count as one document: an upper bound.
    batch, length, heads, _ = q_shape
    return batch * heads * visible_pairs(length, k_shape[1], left, right)


@register_flop_formula(attention_forward)
def _forward_flops(q: Any, k: Any, v: Any, scale: float, left: int, right: int, *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q, k, left, right) * (q[3] + v[3])  # q kᵀ; p v


@register_flop_formula(attention_backward)
def _backward_flops(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    scale: float,
    left: int,
    right: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * _pairs(q, k, left, right) * (3 * q[3] + 2 * v[3])  # q kᵀ, ds k, dsᵀ q; do vᵀ, pᵀ do


def _register_sharding() -> None:
    """Tells DTensor that batch and heads are independent. Anything else is redistributed to one of these first."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placements(q: Any, k: Any, cu_seqlens_q: Any) -> list[tuple[Any, Any]]:
        """(of q, k, v and out; of lse): the batch is dimension 0 of all, heads are dimension 2 and in lse 1."""
        choices: list[tuple[Any, Any]] = [(Replicate(), Replicate())]
        if cu_seqlens_q is None:
            choices.append((Shard(0), Shard(0)))
        if k.shape[2] % q.mesh.size() == 0:  # else a shard would hold query heads without their keys
            choices.append((Shard(2), Shard(1)))
        return choices

    def arguments(cu_seqlens: Any) -> list[Any]:
        documents = None if cu_seqlens is None else Replicate()
        return [None, None, None, documents, documents, None]

    @register_sharding(attention_forward.default)
    def _(q: Any, k: Any, v: Any, scale: Any, left: Any, right: Any, cu_q: Any, cu_k: Any, det: Any) -> list[Any]:
        return [([x, lse], [x, x, x, *arguments(cu_q)]) for x, lse in placements(q, k, cu_q)]

    @register_sharding(attention_backward.default)
    def _(
        dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: Any, left: Any, right: Any, cu_q: Any, cu_k: Any,
        det: Any,
    ) -> list[Any]:  # fmt: skip
        return [([x] * 3, [x] * 5 + [of_lse, *arguments(cu_q)]) for x, of_lse in placements(q, k, cu_q)]


if torch.distributed.is_available():
    _register_sharding()
