"""The experts in plain mathematics, expert by expert: what the operators run on the CPU.

Products accumulate in float32 and round to x's dtype where the kernels do: h, the activation, the experts' outputs and
the gradients of h and of the rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.ops.library import accumulation_dtype, segments
from flashmoe_train.ops.moe.checks import check
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
    """Gradients of x, weights, w1, w2 and w3. The router weight's is the product of a row's activation with its
    gradient, which does not need the experts' outputs."""
    count = check(x, w1, w2, w3, weights, offsets, row_slot, slot_row, score_mode, dout, h)
    wide = accumulation_dtype(x.dtype)
    rows, drows_out = _rows(x, row_slot, slot_row), _rows(dout, row_slot, slot_row)
    row_weight = _row_weights(weights, row_slot)
    dw1, dw2, dw3 = (torch.zeros_like(w, memory_format=torch.contiguous_format) for w in (w1, w2, w3))
    drows = x.new_zeros(count, x.shape[1])
    dweight = x.new_zeros(count, dtype=wide)
    for expert, own in _experts(offsets, count):
        w1_, w2_, w3_ = (w[expert].to(wide) for w in (w1, w2, w3))
        xe, dy = rows[own].to(wide), drows_out[own].to(wide)
        gate, up = h[own].to(wide).chunk(2, 1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        dactivation = dy @ w2_
        if row_weight is not None:
            dweight[own] = (dactivation * activation).sum(1)
            activation, dactivation = activation * row_weight[own], dactivation * row_weight[own]
        dgate = dactivation * up * sigmoid * (1 + gate * (1 - sigmoid))
        dgate, dup = (dh.to(x.dtype).to(wide) for dh in (dgate, dactivation * silu))
        dw1[expert] = (dgate.T @ xe).to(dw1.dtype)
        dw2[expert] = (dy.T @ activation.to(x.dtype).to(wide)).to(dw2.dtype)
        dw3[expert] = (dup.T @ xe).to(dw3.dtype)
        drows[own] = (dgate @ w1_ + dup @ w3_).to(drows.dtype)
    if slot_row is None:
        dx = drows
        dweights = dweight
    else:
        dx = moe_combine(drows, slot_row, None)
        slots = dweight[slot_row.clamp(min=0)] if count else dweight.new_zeros(slot_row.shape)
        dweights = slots.masked_fill(slot_row < 0, 0)
    if weights is None:
        return dx, x.new_empty(0, dtype=torch.float32), dw1, dw2, dw3
    return dx, dweights.to(weights.dtype), dw1, dw2, dw3
