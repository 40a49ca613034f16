"""The experts in plain mathematics, expert by expert: what the operators run on the CPU.

Products accumulate in float32 and round to x's dtype where the kernels do: h, the activation, the experts' outputs and
the gradients of h and of the rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.ops.library import accumulation_dtype, segments
from flashmoe_train.ops.moe.checks import check, check_weight_gradients
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


def reference_backward_data(
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
    """Gradients of x, of weights, and of h; and the weighted activation `[R, n]`. The router weight's gradient is the
    product of a row's activation with its gradient, which does not need the experts' outputs."""
    count = check(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode, dout, h)
    wide = accumulation_dtype(x.dtype)
    drows_out = _rows(dout, row_slot, slot_row)
    row_weight = _row_weights(weights, row_slot)
    drows, dh, a = (x.new_zeros(count, columns) for columns in (x.shape[1], h.shape[1], w1.shape[1]))
    dweight = x.new_zeros(count, dtype=wide)
    for expert, own in _experts(offsets, count):
        w1_, w2_, w3_ = (w[expert].to(wide) for w in (w1, w2, w3))
        dy = drows_out[own].to(wide)
        gate, up = h[own].to(wide).chunk(2, 1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        dactivation = dy @ w2_
        if row_weight is not None:
            dweight[own] = (dactivation * activation).sum(1)
            activation, dactivation = activation * row_weight[own], dactivation * row_weight[own]
        dgate = dactivation * up * sigmoid * (1 + gate * (1 - sigmoid))
        dh[own], a[own] = torch.cat([dgate, dactivation * silu], 1).to(x.dtype), activation.to(x.dtype)
        dgate, dup = dh[own].to(wide).chunk(2, 1)
        drows[own] = (dgate @ w1_ + dup @ w3_).to(drows.dtype)
    if slot_row is None:
        dx = drows
        dweights = dweight
    else:
        dx = moe_combine(drows, slot_row, None)
        slots = dweight[slot_row.clamp(min=0)] if count else dweight.new_zeros(slot_row.shape)
        dweights = slots.masked_fill(slot_row < 0, 0)
    return dx, x.new_empty(0, dtype=torch.float32) if weights is None else dweights.to(weights.dtype), dh, a


def reference_weight_gradients_(
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
    """Writes the gradients of w1, w2 and w3, or adds them: sums in float32 that are rounded to their dtype once."""
    count = check_weight_gradients(dw1, dw2, dw3, dout, x, dh, a, offsets, row_slot, slot_row)
    wide = accumulation_dtype(x.dtype)
    rows, drows_out = _rows(x, row_slot, slot_row), _rows(dout, row_slot, slot_row)
    if not accumulate:
        for dw in (dw1, dw2, dw3):
            dw.zero_()
    for expert, own in _experts(offsets, count):
        xe, dy, activation = (t[own].to(wide) for t in (rows, drows_out, a))
        dgate, dup = dh[own].to(wide).chunk(2, 1)
        for dw, sums in ((dw1, dgate.T @ xe), (dw2, dy.T @ activation), (dw3, dup.T @ xe)):
            dw[expert] += sums.to(dw.dtype)


def reference_backward(
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
    """Gradients of x, weights, w1, w2 and w3."""
    plan = offsets, row_slot, slot_row
    dx, dweights, dh, a = reference_backward_data(dout, x, w1, w2, w3, weights, h, *plan, score_mode)
    dw1, dw2, dw3 = (w.new_empty(w.shape) for w in (w1, w2, w3))
    reference_weight_gradients_(dw1, dw2, dw3, dout, x, dh, a, *plan, False)
    return dx, dweights, dw1, dw2, dw3
