"""`torch.ops.flashmoe.ep_forward`, `ep_gradients`, and `ep_gradients_`, which adds those of the experts' weights to
tensors that it is given: dispatch, experts and combine as one operator each.

One operator, because what lies between dispatch and combine is memory that other ranks write into: no compiler may
move, copy or merge what reads it, and nothing that autograd keeps may point there. `order` and `lost` are what an
exchange changes as far as this process' program can see; being written, they keep exchanges in their order and from
being dropped. `order` holds nothing, so a compiler that hands over a copy does no harm. Gradients write nothing that
forward has read, since autograd would find it changed: each needs another's result, which keeps them in order, and
their operator is one that compilers know to have effects.

Weights may be float32 where tokens have 16 bits: each operator rounds them for itself, so that nobody keeps the rounded
ones, and gradients are float32 as they were summed. That is mixed precision without a pass over gradients. Of weights
that are frozen none are computed: `down` says whether w2's are wanted, `up` whether those of w1 or w3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flashmoe_train.ops.expert_parallel.exchange import Exchange, by_name
from flashmoe_train.ops.expert_parallel.plan import ep_plan
from flashmoe_train.ops.library import ANY_DEVICE, LIBRARY, TAGS, implement
from flashmoe_train.ops.moe.checks import check
from flashmoe_train.ops.moe.experts import (
    experts_backward,
    for_frozen_weights,
    moe_forward,
    moe_weight_gradient_down_,
    moe_weight_gradient_up_,
)
from flashmoe_train.ops.moe.plan import RoutePlan, route_plan

_SAVED = (
    "Tensor h, Tensor offsets, Tensor row_slot, Tensor slot_row, Tensor arrived_weights,"
    " Tensor position, Tensor counts, Tensor arrived"
)
LIBRARY.define(
    "ep_forward(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor ids, Tensor weights, Tensor(a!) order,"
    f" Tensor(b!) lost, str exchange, int layer, str score_mode) -> (Tensor out, {_SAVED})",
    tags=TAGS,
)
_GIVEN = (
    f"Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor ids, {_SAVED}, str exchange, int layer,"
    " str score_mode"
)
LIBRARY.define(
    f"ep_gradients({_GIVEN}, bool down, bool up) -> (Tensor dx, Tensor dweights, Tensor dw1, Tensor dw2, Tensor dw3)",
    tags=TAGS,
)
LIBRARY.define(
    f"ep_gradients_(Tensor(a!) dw1, Tensor(b!) dw2, Tensor(c!) dw3, {_GIVEN}) -> (Tensor dx, Tensor dweights)",
    tags=TAGS,
)
ep_forward = torch.ops.flashmoe.ep_forward
ep_gradients = torch.ops.flashmoe.ep_gradients
ep_gradients_ = torch.ops.flashmoe.ep_gradients_
torch.fx.node.has_side_effect(ep_gradients.default)


def _forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    weights: Tensor,
    order: Tensor,
    lost: Tensor,
    exchange: str,
    layer: int,
    score_mode: str,
) -> tuple[Tensor, ...]:
    own = by_name(exchange)
    own.check()
    w1, w2, w3 = rounded(x, w1, w2, w3)
    position, counts = ep_plan(ids, own.experts, own.world)
    tokens = own.transport.dispatch(x, position, counts, layer, ids.contiguous(), weights.contiguous())
    assert tokens.ids is not None and tokens.weights is not None
    plan = _within(own, route_plan(tokens.ids, own.here), lost, layer)
    rows, h = moe_forward(tokens.rows, w1, w2, w3, tokens.weights, *plan, score_mode)
    out, _ = own.transport.combine(rows, position, counts, tokens.counts, layer)
    return out, h, *plan, tokens.weights, position, counts, tokens.counts


def rounded(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights in the dtype of the tokens that they multiply."""
    return w1.to(x.dtype), w2.to(x.dtype), w3.to(x.dtype)


def _within(own: Exchange, plan: RoutePlan, lost: Tensor, layer: int) -> RoutePlan:
    """The plan without the rows that there is no room for: the last ones, of the last experts."""
    if own.rows >= plan.row_slot.shape[0]:
        return plan
    lost[layer] += (plan.offsets[-1] - own.rows).clamp(min=0)
    return RoutePlan(
        plan.offsets.clamp(max=own.rows),
        plan.row_slot[: own.rows].clone(),  # a view would keep all of it until backward
        plan.slot_row.masked_fill(plan.slot_row >= own.rows, -1),
    )


def _gradients(dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *saved, needs_down, needs_up = given

    def down(*rows: Tensor | None) -> Tensor:
        dw2 = torch.empty_like(w2, memory_format=torch.contiguous_format)
        moe_weight_gradient_down_(dw2, *rows, False)
        return dw2

    def up(*rows: Tensor | None) -> tuple[Tensor, Tensor]:
        dw1, dw3 = (torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w1, w3))
        moe_weight_gradient_up_(dw1, dw3, *rows, False)
        return dw1, dw3

    computed = down if needs_down else for_frozen_weights, up if needs_up else for_frozen_weights
    dx, dweights, dw2, of_up = _exchanged(*computed, dout, x, w1, w2, w3, *saved)
    dw1, dw3 = of_up or (_not_wanted(w1), _not_wanted(w3))
    return dx, dweights, dw1, dw2 if needs_down else _not_wanted(w2), dw3


def _not_wanted(w: Tensor) -> Tensor:
    return w.new_empty((0, *w.shape[1:]))


def _gradients_(dw1: Tensor, dw2: Tensor, dw3: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    def down(*rows: Tensor | None) -> None:
        moe_weight_gradient_down_(dw2, *rows, True)

    def up(*rows: Tensor | None) -> None:
        moe_weight_gradient_up_(dw1, dw3, *rows, True)

    return _exchanged(down, up, *given)[:2]


def _exchanged(
    down: Callable[..., Any],
    up: Callable[..., Any],
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    arrived_weights: Tensor,
    position: Tensor,
    counts: Tensor,
    arrived: Tensor,
    exchange: str,
    layer: int,
    score_mode: str,
) -> tuple[Tensor, Tensor, Any, Any]:
    """dx, dweights, and what `down` and `up` give, which `experts_backward` calls: all that reads arrived tokens is
    launched between the exchanges."""
    own = by_name(exchange)
    own.check()
    douts = own.transport.dispatch(dout, position, counts, layer).rows
    tokens = own.transport.dispatch(x, position, counts, layer).rows
    saved = [tokens, *rounded(x, w1, w2, w3), arrived_weights, offsets, row_slot, slot_row, h]
    drows, dslots, *dw = experts_backward(douts, saved, score_mode, down, up, keep_rows=down is not for_frozen_weights)
    dx, dweights = own.transport.combine(drows, position, counts, arrived, layer, dslots, ids.contiguous())
    assert dweights is not None
    return dx, dweights, *dw


implement("ep_forward", _forward, ANY_DEVICE)
implement("ep_gradients", _gradients, ANY_DEVICE)
implement("ep_gradients_", _gradients_, ANY_DEVICE)


@torch.library.register_fake("flashmoe::ep_forward", lib=LIBRARY)
def _(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    weights: Tensor,
    order: Tensor,
    lost: Tensor,
    exchange: str,
    layer: int,
    score_mode: str,
) -> tuple[Tensor, ...]:
    own = by_name(exchange)
    integers = lambda *size: ids.new_empty(size, dtype=torch.int32)  # noqa: E731
    offsets, row_slot = integers(own.here + 1), integers(own.rows)
    slot_row = integers(own.places, own.top_k)
    arrived_weights = weights.new_empty((own.places, own.top_k))
    w1, w2, w3 = rounded(x, w1, w2, w3)
    check(x.new_empty((own.places, own.dim)), w1, w2, w3, arrived_weights, offsets, row_slot, slot_row, score_mode)
    h = x.new_empty((own.rows, 2 * w1.shape[1]))
    position, counts, arrived = integers(x.shape[0], own.world), integers(own.world), integers(own.world)
    return x.new_empty(x.shape), h, offsets, row_slot, slot_row, arrived_weights, position, counts, arrived


@torch.library.register_fake("flashmoe::ep_gradients", lib=LIBRARY)
def _(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    arrived_weights: Tensor,
    *exchanged: Any,
) -> tuple[Tensor, ...]:
    *_, down, up = exchanged
    dw = (w.new_empty(w.shape) if need else _not_wanted(w) for w, need in ((w1, up), (w2, down), (w3, up)))
    return x.new_empty(x.shape), arrived_weights.new_empty(ids.shape), *dw


@torch.library.register_fake("flashmoe::ep_gradients_", lib=LIBRARY)
def _(
    dw1: Tensor,
    dw2: Tensor,
    dw3: Tensor,
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    arrived_weights: Tensor,
    *exchanged: object,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), arrived_weights.new_empty(ids.shape)


# Of the rows that an even share has, since only the devices know how many there are.


@register_flop_formula(ep_forward)
def _forward_flops(x: tuple, w1: tuple, w2: tuple, w3: tuple, ids: tuple, *args: object, **kwargs: object) -> int:
    return 6 * ids[0] * ids[1] * w1[1] * w1[2]


@register_flop_formula(ep_gradients)
def _gradient_flops(
    dout: tuple, x: tuple, w1: tuple, w2: tuple, w3: tuple, ids: tuple, *args: Any, **kwargs: object
) -> int:
    *_, down, up = args
    return (6 + 2 * down + 4 * up) * ids[0] * ids[1] * w1[1] * w1[2]


@register_flop_formula(ep_gradients_)
def _added_gradient_flops(dw1: tuple, dw2: tuple, dw3: tuple, *args: Any, **kwargs: Any) -> int:
    return _gradient_flops(*args, True, True, **kwargs)
