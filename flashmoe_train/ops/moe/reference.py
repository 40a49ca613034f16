"""The experts in plain mathematics, expert by expert: what the operators run on the CPU.

Products accumulate in float32 and round to x's dtype where the kernels do: h, the activation, the experts' outputs and
the gradients of h and of the rows.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.ops.library import accumulation_dtype, segments
from flashmoe_train.ops.moe.checks import (
    check,
    check_down_backward,
    check_up_backward,
    check_weight_gradient_down,
    check_weight_gradient_up,
)
from flashmoe_train.ops.moe.rows import moe_combine, moe_permute


def _experts(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    for expert, (begin, end) in enumerate(segments("offsets", offsets, rows)):
        if end > begin:
            yield expert, slice(begin, end)


def _rows(x: Tensor, row_slot: Tensor | None, slot_row: Tensor | None) -> Tensor:
    return x if row_slot is None or slot_row is None else moe_permute(x, row_slot, slot_row)


def _row_weights(weights: Tensor | None, row_slot: Tensor | None) -> Tensor | None:
    """The router weight of each row, `[R, 1]`."""
    if weights is None:
        return None
    flat = weights.reshape(-1)
    if row_slot is not None:
        flat = flat[row_slot.clamp(min=0)] if flat.numel() else flat.new_zeros(row_slot.shape)
    return flat[:, None]


def reference_forward(
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
    """out in x's shape and h `[R, 2n]`, both zero in rows that belong to nobody."""
    count = check(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode)
    wide = accumulation_dtype(x.dtype)
    rows = _rows(x, row_slot, slot_row)
    row_weight = _row_weights(weights, row_slot) if score_mode == "activation" else None
    h = x.new_zeros(count, 2 * w1.shape[1])
    y = x.new_zeros(count, x.shape[1])
    for expert, own in _experts(offsets, count):
        w1_, w2_, w3_ = (w[expert].to(wide) for w in (w1, w2, w3))
        xe = rows[own].to(wide)
        h[own] = torch.cat([xe @ w1_.T, xe @ w3_.T], 1).to(h.dtype)
        gate, up = h[own].to(wide).chunk(2, 1)
        activation = F.silu(gate) * up
        if row_weight is not None:
            activation *= row_weight[own]
        y[own] = (activation.to(x.dtype).to(wide) @ w2_.T).to(y.dtype)
    if slot_row is None:
        return y, h
    return moe_combine(y, slot_row, weights if score_mode == "combine" else None), h


def reference_down_backward(
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
    """Gradients of h, the weighted activation `[R, n]`, gradients of weights, and the rows of dout if they are kept.
    The router weight's gradient is the product of a row's activation with its gradient, which does not need the
    experts' outputs."""
    count = check_down_backward(dout, w2, weights, h, offsets, row_slot, slot_row, score_mode)
    wide = accumulation_dtype(dout.dtype)
    dy = _rows(dout, row_slot, slot_row)
    row_weight = _row_weights(weights, row_slot)
    dh, a = (dout.new_zeros(count, columns) for columns in (h.shape[1], w2.shape[2]))
    dweight = dout.new_zeros(count, dtype=wide)
    for expert, own in _experts(offsets, count):
        gate, up = h[own].to(wide).chunk(2, 1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        dactivation = dy[own].to(wide) @ w2[expert].to(wide)
        if row_weight is not None:
            dweight[own] = (dactivation * activation).sum(1)
            activation, dactivation = activation * row_weight[own], dactivation * row_weight[own]
        dgate = dactivation * up * sigmoid * (1 + gate * (1 - sigmoid))
        dh[own], a[own] = torch.cat([dgate, dactivation * silu], 1).to(dout.dtype), activation.to(dout.dtype)
    kept = dy if keep_rows and row_slot is not None else dout.new_empty((0, dout.shape[1]))
    return dh, a, _dweights(dweight, weights, slot_row), kept


def _dweights(of_rows: Tensor, weights: Tensor | None, slot_row: Tensor | None) -> Tensor:
    if weights is None:
        return of_rows.new_empty(0, dtype=torch.float32)
    if slot_row is None:
        return of_rows.to(weights.dtype)
    slots = of_rows[slot_row.clamp(min=0)] if of_rows.numel() else of_rows.new_zeros(slot_row.shape)
    return slots.masked_fill(slot_row < 0, 0).to(weights.dtype)


def reference_up_backward(
    dh: Tensor, w1: Tensor, w3: Tensor, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> Tensor:
    """The gradient of x."""
    check_up_backward(dh, w1, w3, offsets, row_slot, slot_row)
    wide = accumulation_dtype(dh.dtype)
    drows = dh.new_zeros(dh.shape[0], w1.shape[2])
    for expert, own in _experts(offsets, dh.shape[0]):
        dgate, dup = dh[own].to(wide).chunk(2, 1)
        drows[own] = (dgate @ w1[expert].to(wide) + dup @ w3[expert].to(wide)).to(drows.dtype)
    return drows if slot_row is None else moe_combine(drows, slot_row, None)


def reference_weight_gradient_down_(
    dw2: Tensor,
    dout: Tensor,
    a: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    accumulate: bool,
) -> None:
    """Writes the gradient of w2, or adds it: sums in float32 that are rounded to its dtype once."""
    check_weight_gradient_down(dw2, dout, a, offsets, row_slot, slot_row)
    _sum_products([dw2], [_rows(dout, row_slot, slot_row)], a, offsets, accumulate)


def reference_weight_gradient_up_(
    dw1: Tensor,
    dw3: Tensor,
    x: Tensor,
    dh: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    accumulate: bool,
) -> None:
    """The same of w1 and w3."""
    check_weight_gradient_up(dw1, dw3, x, dh, offsets, row_slot, slot_row)
    _sum_products([dw1, dw3], dh.chunk(2, 1), _rows(x, row_slot, slot_row), offsets, accumulate)


def _sum_products(
    sums: Sequence[Tensor], left: Sequence[Tensor], right: Tensor, offsets: Tensor, accumulate: bool
) -> None:
    """leftᵀ right of each expert's rows."""
    wide = accumulation_dtype(right.dtype)
    for dw, rows in zip(sums, left, strict=True):
        if not accumulate:
            dw.zero_()
        for expert, own in _experts(offsets, right.shape[0]):
            dw[expert] += (rows[own].to(wide).T @ right[own].to(wide)).to(dw.dtype)
