"""`torch.ops.flashmoe.moe_forward` and `moe_backward`, and the two parts of the latter: schema, fake, autograd, FLOPs.

Forward keeps `h` `[R, 2n]`, the experts' pre-activations (gate in the first n columns, up in the last n), rounded to
x's dtype; everything else that backward needs is an input. With `row_slot` and `slot_row` x holds tokens and out too;
without them both hold rows that are sorted by expert already.

`moe_backward_data` gives what other layers wait for, and what `moe_weight_gradients_` makes the gradients of the
experts' weights from: the gradient of h, and `a` `[R, n]`, the weighted activation. In h and in both of these, rows
that belong to nobody may hold anything.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flashmoe_train.ops.library import LIBRARY, TAGS, differentiable_once, implement
from flashmoe_train.ops.moe.checks import check, check_weight_gradients
from flashmoe_train.ops.moe.reference import (
    reference_backward,
    reference_backward_data,
    reference_forward,
    reference_weight_gradients_,
)

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
LIBRARY.define(
    f"moe_backward_data(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor? weights, Tensor h, {_PLAN})"
    " -> (Tensor dx, Tensor dweights, Tensor dh, Tensor a)",
    tags=TAGS,
)
LIBRARY.define(
    "moe_weight_gradients_(Tensor(a!) dw1, Tensor(b!) dw2, Tensor(c!) dw3, Tensor dout, Tensor x, Tensor dh, Tensor a,"
    " Tensor offsets, Tensor? row_slot, Tensor? slot_row, bool accumulate) -> ()",
    tags=TAGS,
)
moe_forward = torch.ops.flashmoe.moe_forward
moe_backward = torch.ops.flashmoe.moe_backward
moe_backward_data = torch.ops.flashmoe.moe_backward_data
moe_weight_gradients_ = torch.ops.flashmoe.moe_weight_gradients_

implement("moe_forward", reference_forward, "CPU")
implement("moe_backward", reference_backward, "CPU")
implement("moe_backward_data", reference_backward_data, "CPU")
implement("moe_weight_gradients_", reference_weight_gradients_, "CPU")


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
    dw1, dw2, dw3 = (w.new_empty(w.shape) for w in (w1, w2, w3))
    return x.new_empty(x.shape), _dweights(x, weights), dw1, dw2, dw3


@torch.library.register_fake("flashmoe::moe_backward_data", lib=LIBRARY)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = check(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode, dout, h)
    return x.new_empty(x.shape), _dweights(x, weights), h.new_empty(h.shape), x.new_empty((rows, w1.shape[1]))


def _dweights(x: Tensor, weights: Tensor | None) -> Tensor:
    return x.new_empty((0,), dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)


@torch.library.register_fake("flashmoe::moe_weight_gradients_", lib=LIBRARY)
def _(
    dw1: Tensor,
    dw2: Tensor,
    dw3: Tensor,
    dout: Tensor,
    x: Tensor,
    dh: Tensor,
    a: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    accumulate: bool,
) -> None:
    check_weight_gradients(dw1, dw2, dw3, dout, x, dh, a, offsets, row_slot, slot_row)


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
differentiable_once("moe_backward_data")


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


@register_flop_formula(moe_backward_data)
def _backward_data_flops(
    dout: Any, x: Any, w1: Any, w2: Any, w3: Any, weights: Any, h: Any, *args: Any, **kwargs: Any
) -> int:
    return 6 * h[0] * w1[1] * w1[2]


@register_flop_formula(moe_weight_gradients_)
def _weight_gradients_flops(dw1: Any, dw2: Any, dw3: Any, dout: Any, x: Any, dh: Any, *args: Any, **kwargs: Any) -> int:
    return 6 * dh[0] * dw1[1] * dw1[2]
