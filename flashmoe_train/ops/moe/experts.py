"""`torch.ops.flashmoe.moe_forward` and the operators that its backward is made of: schema, fake, autograd, FLOPs.

Forward keeps `h` `[R, 2n]`, the experts' pre-activations (gate in the first n columns, up in the last n), rounded to
x's dtype; everything else that backward needs is an input. With `row_slot` and `slot_row` x holds tokens and out too;
without them both hold rows that are sorted by expert already.

Backward is operators that are divided by what is alive, so that its largest tensors are gone as soon as nothing needs
them: a caller holds what it gives to one operator until that is done.

    moe_down_backward         dout, h   ->  dh, a, dweights, dy    h is not needed any more
    moe_weight_gradient_down  dout, a   ->  dw2                    nor a and dy
    moe_up_backward           dh        ->  dx
    moe_weight_gradient_up    x, dh     ->  dw1, dw3

dh `[R, 2n]` is the gradient of h, `a` `[R, n]` the weighted activation. dy, if `keep_rows` asks for it, holds the rows
of dout `[R, d]`, from which dw2 is then made as without a plan; else it is empty, and dout is permuted again. The
gradients of weights also come as operators that write or add them to given tensors: names that end in `_`. In h, dh
and a, rows that belong to nobody may hold anything.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flashmoe_train.ops.library import ANY_DEVICE, LIBRARY, TAGS, differentiable_once, implement
from flashmoe_train.ops.moe.checks import (
    check,
    check_down_backward,
    check_indices,
    check_matrix,
    check_up_backward,
    check_weight_gradient_down,
    check_weight_gradient_up,
)
from flashmoe_train.ops.moe.reference import (
    reference_down_backward,
    reference_forward,
    reference_up_backward,
    reference_weight_gradient_down_,
    reference_weight_gradient_up_,
)

_PLAN = "Tensor offsets, Tensor? row_slot, Tensor? slot_row"
for schema in (
    f"moe_forward(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor? weights, {_PLAN}, str score_mode)"
    " -> (Tensor out, Tensor h)",
    f"moe_down_backward(Tensor dout, Tensor w2, Tensor? weights, Tensor h, {_PLAN}, str score_mode, bool keep_rows)"
    " -> (Tensor dh, Tensor a, Tensor dweights, Tensor dy)",
    f"moe_up_backward(Tensor dh, Tensor w1, Tensor w3, {_PLAN}) -> Tensor dx",
    f"moe_weight_gradient_down(Tensor dout, Tensor a, {_PLAN}) -> Tensor dw2",
    f"moe_weight_gradient_down_(Tensor(a!) dw2, Tensor dout, Tensor a, {_PLAN}, bool accumulate) -> ()",
    f"moe_weight_gradient_up(Tensor x, Tensor dh, {_PLAN}) -> (Tensor dw1, Tensor dw3)",
    f"moe_weight_gradient_up_(Tensor(a!) dw1, Tensor(b!) dw3, Tensor x, Tensor dh, {_PLAN}, bool accumulate) -> ()",
):
    LIBRARY.define(schema, tags=TAGS)
moe_forward = torch.ops.flashmoe.moe_forward
moe_down_backward = torch.ops.flashmoe.moe_down_backward
moe_up_backward = torch.ops.flashmoe.moe_up_backward
moe_weight_gradient_down = torch.ops.flashmoe.moe_weight_gradient_down
moe_weight_gradient_down_ = torch.ops.flashmoe.moe_weight_gradient_down_
moe_weight_gradient_up = torch.ops.flashmoe.moe_weight_gradient_up
moe_weight_gradient_up_ = torch.ops.flashmoe.moe_weight_gradient_up_

implement("moe_forward", reference_forward, "CPU")
implement("moe_down_backward", reference_down_backward, "CPU")
implement("moe_up_backward", reference_up_backward, "CPU")
implement("moe_weight_gradient_down_", reference_weight_gradient_down_, "CPU")
implement("moe_weight_gradient_up_", reference_weight_gradient_up_, "CPU")


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


@torch.library.register_fake("flashmoe::moe_down_backward", lib=LIBRARY)
def _(
    dout: Tensor,
    w2: Tensor,
    weights: Tensor | None,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    score_mode: str,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = check_down_backward(dout, w2, weights, h, offsets, row_slot, slot_row, score_mode)
    dweights = dout.new_empty((0,), dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    kept = rows if keep_rows and row_slot is not None else 0
    dh, a, dy = (dout.new_empty(shape) for shape in (h.shape, (rows, w2.shape[2]), (kept, dout.shape[1])))
    return dh, a, dweights, dy


@torch.library.register_fake("flashmoe::moe_up_backward", lib=LIBRARY)
def _(dh: Tensor, w1: Tensor, w3: Tensor, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None) -> Tensor:
    return dh.new_empty((check_up_backward(dh, w1, w3, offsets, row_slot, slot_row), w1.shape[2]))


@torch.library.register_fake("flashmoe::moe_weight_gradient_down_", lib=LIBRARY)
def _(
    dw2: Tensor,
    dout: Tensor,
    a: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    accumulate: bool,
) -> None:
    check_weight_gradient_down(dw2, dout, a, offsets, row_slot, slot_row)


@torch.library.register_fake("flashmoe::moe_weight_gradient_up_", lib=LIBRARY)
def _(
    dw1: Tensor,
    dw3: Tensor,
    x: Tensor,
    dh: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    accumulate: bool,
) -> None:
    check_weight_gradient_up(dw1, dw3, x, dh, offsets, row_slot, slot_row)


# New tensors, for autograd. Operators too: compilers find nothing written in them that they would have to copy, and
# asking for their gradients is an error. The others do the work, on every device and as fakes.


def _weight_gradient_down(
    dout: Tensor, a: Tensor, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> Tensor:
    shape = _shape_of_w1("dout", dout, "a", a, offsets)
    dw2 = dout.new_empty((shape[0], shape[2], shape[1]))
    moe_weight_gradient_down_(dw2, dout, a, offsets, row_slot, slot_row, False)
    return dw2


def _weight_gradient_up(
    x: Tensor, dh: Tensor, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> tuple[Tensor, Tensor]:
    experts, columns, model = _shape_of_w1("x", x, "dh", dh, offsets)
    dw1, dw3 = (x.new_empty((experts, columns // 2, model)) for _ in range(2))
    moe_weight_gradient_up_(dw1, dw3, x, dh, offsets, row_slot, slot_row, False)
    return dw1, dw3


def _shape_of_w1(name: str, tokens: Tensor, rows_name: str, rows: Tensor, offsets: Tensor) -> tuple[int, int, int]:
    check_matrix(name, tokens)
    check_matrix(rows_name, rows)
    check_indices("offsets", offsets, 1, tokens.device)
    return offsets.shape[0] - 1, rows.shape[1], tokens.shape[1]


for name, function in (
    ("moe_weight_gradient_down", _weight_gradient_down),
    ("moe_weight_gradient_up", _weight_gradient_up),
):
    implement(name, function, ANY_DEVICE)
    torch.library.register_fake(f"flashmoe::{name}", function, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.score_mode = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx: Any, dout: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    needs_w1, needs_w2, needs_w3 = ctx.needs_input_grad[1:4]
    down = moe_weight_gradient_down if needs_w2 else for_frozen_weights
    up = moe_weight_gradient_up if needs_w1 or needs_w3 else for_frozen_weights
    found = experts_backward(dout, saved_tensors(ctx), ctx.score_mode, down, up, keep_rows=needs_w2)
    dx, dweights, dw2, of_up = found
    dw1, dw3 = of_up or (None, None)
    return dx, dw1, dw2, dw3, dweights, None, None, None, None


def for_frozen_weights(*given: Tensor | None) -> None:
    """For `experts_backward`, in place of gradients that nobody has asked for: half of its products, all of them."""


def saved_tensors(ctx: Any) -> list[Any]:
    """What a context has saved, for `experts_backward`. The context holds it no longer, unless the graph is kept for
    another backward (`retain_graph`): as AOTAutograd does it for compiled code."""
    saved = [*ctx.saved_tensors]
    ctx.maybe_clear_saved_tensors()
    return saved


def experts_backward(
    dout: Tensor,
    saved: list[Any],
    score_mode: str,
    down: Callable[..., Any] = moe_weight_gradient_down,
    up: Callable[..., Any] = moe_weight_gradient_up,
    keep_rows: bool = True,
) -> tuple[Tensor, Tensor | None, Any, Any]:
    """Backward of `moe_forward`, the operators in the order in which the fewest bytes are alive at once.

    Args:
        dout: like out.
        saved: x, w1, w2, w3, weights, offsets, row_slot, slot_row, h. Empty afterwards: where nobody else holds h, its
            memory is free when nothing needs it any more.
        score_mode: forward's.
        down, up: called with (dout, a, the plan) and (x, dh, the plan) of the operators that have their names.
        keep_rows: whether the rows of dout may stay for `down`. False where that only takes note of them.

    Returns:
        (dx, dweights or None, what `down` returns, what `up` returns).
    """
    x, w1, w2, w3, weights, offsets, row_slot, slot_row, h = saved
    saved.clear()
    plan = offsets, row_slot, slot_row
    dout = dout.contiguous()
    # From n and d alone: R may be a number that a compiler does not know. R (5n + d) numbers are alive with h, dh and a
    # then, R · 4d at most, instead of R · 5n.
    hidden, dim = w1.shape[1:]
    keep_rows = keep_rows and row_slot is not None and 5 * hidden <= 3 * dim
    dh, a, dweights, dy = moe_down_backward(dout, w2, weights, h, *plan, score_mode, keep_rows)
    del h
    of_down = (dy, a, offsets, None, None) if keep_rows else (dout, a, *plan)
    del a, dy
    # dw2 takes the place of a. Where n is larger than d, experts are few and large, and it may be far more than a: then
    # it comes last, and a stays, which is within the peak from before: R (3n + d) numbers with dx's rows.
    at_once = hidden <= dim
    if at_once:
        dw2 = down(*of_down)
        del of_down
    dx = moe_up_backward(dh, w1, w3, *plan)
    of_up = up(x, dh, *plan)
    del dh
    if not at_once:
        dw2 = down(*of_down)
    return dx, None if weights is None else dweights, dw2, of_up


torch.library.register_autograd("flashmoe::moe_forward", _autograd, setup_context=_setup_context, lib=LIBRARY)
for name in ("moe_down_backward", "moe_up_backward", "moe_weight_gradient_down", "moe_weight_gradient_up"):
    differentiable_once(name)


# Three products forward, six backward; every row counts, since only the device knows how many belong to nobody.


@register_flop_formula(moe_forward)
def _forward_flops(
    x: Any, w1: Any, w2: Any, w3: Any, weights: Any, offsets: Any, row_slot: Any, *args: Any, **kwargs: Any
) -> int:
    return 6 * (x[0] if row_slot is None else row_slot[0]) * w1[1] * w1[2]


@register_flop_formula(moe_down_backward)
def _down_backward_flops(dout: Any, w2: Any, weights: Any, h: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * h[0] * w2[1] * w2[2]


@register_flop_formula(moe_up_backward)
def _up_backward_flops(dh: Any, w1: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * dh[0] * w1[1] * w1[2]


@register_flop_formula(moe_weight_gradient_down)
def _weight_gradient_down_flops(dout: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * dout[1]


@register_flop_formula(moe_weight_gradient_up)
def _weight_gradient_up_flops(x: Any, dh: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * dh[0] * dh[1] * x[1]


@register_flop_formula(moe_weight_gradient_down_)
def _added_down_flops(dw2: Any, *args: Any, **kwargs: Any) -> int:
    return _weight_gradient_down_flops(*args)


@register_flop_formula(moe_weight_gradient_up_)
def _added_up_flops(dw1: Any, dw3: Any, *args: Any, **kwargs: Any) -> int:
    return _weight_gradient_up_flops(*args)
