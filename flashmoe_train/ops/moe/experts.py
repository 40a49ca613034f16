"""`torch.ops.flashmoe.moe_forward` and `moe_backward`: schema, fake, autograd, FLOPs.

Forward keeps `h` `[R, 2n]`, the experts' pre-activations (gate in the first n columns, up in the last n), rounded to
x's dtype; everything else that backward needs is an input. With `row_slot` and `slot_row` x holds tokens and out too;
without them both hold rows that are sorted by expert already.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flashmoe_train.ops.library import LIBRARY, TAGS, differentiable_once, implement
from flashmoe_train.ops.moe.checks import check
from flashmoe_train.ops.moe.reference import reference_backward, reference_forward

_PLAN = "Tensor offsets, Tensor? row_slot, Tensor? slot_row, str score_mode"
LIBRARY.define(
    f"moe_forward(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor? weights, {_PLAN}) -> (Tensor out, Tensor h)",
    tags=TAGS,
)
LIBRARY.define(
    f"moe_backward(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor? weights, Tensor h, {_PLAN})"
    " -> (Tensor dx, Tensor dweights, Tensor dw1, Tensor dw2, Tensor dw3)",
    tags=TAGS,
)
moe_forward = torch.ops.flashmoe.moe_forward
moe_backward = torch.ops.flashmoe.moe_backward

implement("moe_forward", reference_forward, "CPU")
implement("moe_backward", reference_backward, "CPU")


@torch.library.register_fake("flashmoe::moe_forward", lib=LIBRARY)
def _(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    score_mode: str,
) -> tuple[Tensor, Tensor]:
    rows = check(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode)
    return x.new_empty(x.shape), x.new_empty((rows, 2 * w1.shape[1]))


@torch.library.register_fake("flashmoe::moe_backward", lib=LIBRARY)
def _(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    weights: Tensor | None,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    score_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode, dout, h)
    dweights = x.new_empty((0,), dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    return x.new_empty(x.shape), dweights, w1.new_empty(w1.shape), w2.new_empty(w2.shape), w3.new_empty(w3.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.score_mode = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx: Any, dout: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    x, w1, w2, w3, weights, offsets, row_slot, slot_row, h = ctx.saved_tensors
    dx, dweights, dw1, dw2, dw3 = moe_backward(
        dout.contiguous(), x, w1, w2, w3, weights, h, offsets, row_slot, slot_row, ctx.score_mode
    )
    return dx, dw1, dw2, dw3, None if weights is None else dweights, None, None, None, None


torch.library.register_autograd("flashmoe::moe_forward", _autograd, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("moe_backward")


# Three products forward, six backward; every row counts, since only the device knows how many belong to nobody.


@register_flop_formula(moe_forward)
def _forward_flops(
    x: Any, w1: Any, w2: Any, w3: Any, weights: Any, offsets: Any, row_slot: Any, *args: Any, **kwargs: Any
) -> int:
    return 6 * (x[0] if row_slot is None else row_slot[0]) * w1[1] * w1[2]


@register_flop_formula(moe_backward)
def _backward_flops(
    dout: Any, x: Any, w1: Any, w2: Any, w3: Any, weights: Any, h: Any, *args: Any, **kwargs: Any
) -> int:
    return 12 * h[0] * w1[1] * w1[2]
