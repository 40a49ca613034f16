"""`moe_permute` and `moe_combine`: from tokens to the experts' rows and back; each is the other's gradient.

    permute: rows[r] = x[row_slot[r] // K]              combine: out[t] = Σ_k weights[t, k] · rows[slot_row[t, k]]

The sum runs over k in order and in float32, so both directions repeat bitwise: no atomics. Slots without a row (-1) add
nothing, rows without a slot are zero, whatever lies there: 0 · NaN is never formed. Runs on any device by PyTorch's own
operations until the device has a kernel.
"""

from typing import Any

import torch
from torch import Tensor

from flashmoe_train.ops.library import (
    ANY_DEVICE,
    LIBRARY,
    TAGS,
    accumulation_dtype,
    differentiable_once,
    implement,
    reverse_mode_only,
)
from flashmoe_train.ops.moe.checks import check_indices, check_matrix, check_weights

LIBRARY.define("moe_permute(Tensor x, Tensor row_slot, Tensor slot_row) -> Tensor rows", tags=TAGS)
LIBRARY.define("moe_combine(Tensor rows, Tensor slot_row, Tensor? weights) -> Tensor out", tags=TAGS)
LIBRARY.define(
    "moe_combine_backward(Tensor dout, Tensor rows, Tensor slot_row, Tensor weights)"
    " -> (Tensor drows, Tensor dweights)",
    tags=TAGS,
)


def moe_permute(x: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    """Copies tokens `x` `[T, d]` into the rows `[R, d]` of a plan; rows that belong to nobody are zero.

    `row_slot` and `slot_row` are a RoutePlan's, or of the same form with fewer rows (a part of the slots): each the
    inverse of the other. That is an error on the CPU where they are not, a device-side assertion in the CUDA kernel.
    Raises ValueError or TypeError that names the argument.
    """
    _check_permute(x, row_slot, slot_row)
    reverse_mode_only("moe_permute", x)
    return torch.ops.flashmoe.moe_permute(x, row_slot, slot_row)


def moe_combine(rows: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    """Sums the rows `[R, d]` of each token's slots, times `weights` (float32 `[T, K]`), in float32: `[T, d]` in rows'
    dtype.

    No two slots share a row: the gradient would have two writers. That is an error on the CPU where they do; on a GPU
    the sum is taken all the same, and the kernels of the gradient assert it.
    Raises ValueError or TypeError that names the argument.
    """
    _check_combine(rows, slot_row, weights)
    reverse_mode_only("moe_combine", rows, weights)
    return torch.ops.flashmoe.moe_combine(rows, slot_row, weights)


def inverse(indices: Tensor, count: int) -> Tensor:
    """int32 `[count]`: at which (flat) position of `indices` each of 0 ... count - 1 stands, -1 if nowhere. Negative
    indices are skipped. Turns slot_row into row_slot and back."""
    flat = indices.reshape(-1).long()
    positions = torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device)
    spare = torch.where(flat < 0, count, flat)  # what is skipped writes behind the end
    return positions.new_full((count + 1,), -1).scatter(0, spare, positions)[:-1]


# -------------------------------------------------------------------------------------------------------------- checks


def _check_permute(x: Tensor, row_slot: Tensor, slot_row: Tensor) -> None:
    check_matrix("x", x)
    check_indices("row_slot", row_slot, 1, x.device)
    check_indices("slot_row", slot_row, 2, x.device)
    if slot_row.shape[0] != x.shape[0]:
        raise ValueError(f"slot_row must have one row per token of x, found {list(slot_row.shape)}, x {list(x.shape)}")


def _check_combine(rows: Tensor, slot_row: Tensor, weights: Tensor | None) -> None:
    check_matrix("rows", rows)
    check_indices("slot_row", slot_row, 2, rows.device)
    if weights is not None:
        check_weights(weights, slot_row.shape, rows)


def _check_combine_backward(dout: Tensor, rows: Tensor, slot_row: Tensor, weights: Tensor) -> None:
    _check_combine(rows, slot_row, weights)
    check_matrix("dout", dout)
    if dout.shape[0] != slot_row.shape[0] or dout.shape[1] != rows.shape[1]:
        raise ValueError(f"dout must be [{slot_row.shape[0]}, {rows.shape[1]}], found {list(dout.shape)}")
    if dout.dtype != rows.dtype:
        raise TypeError(f"dout must have the dtype of rows, {rows.dtype}, found {dout.dtype}")
    if dout.device != rows.device:
        raise ValueError(f"dout must be on {rows.device}, found {dout.device}")


# ----------------------------------------------------------------------------------------------------------- reference


def _permute(x: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    _check_permute(x, row_slot, slot_row)
    if x.device.type == "cpu":
        _check_rows("row_slot", slot_row, row_slot.shape[0])
        if not torch.equal(inverse(slot_row, row_slot.shape[0]), row_slot):
            raise ValueError("slot_row must be the inverse of row_slot")
        _check_one_to_one(slot_row, row_slot.shape[0])
    if slot_row.numel() == 0:
        return x.new_zeros(row_slot.shape[0], x.shape[1])
    token = row_slot.clamp(min=0) // slot_row.shape[1]
    return x[token].masked_fill_((row_slot < 0)[:, None], 0)


def _check_rows(name: str, slot_row: Tensor, count: int) -> None:
    if slot_row.numel() and int(slot_row.max()) >= count:
        raise ValueError(f"slot_row names a row that {name} does not have: {int(slot_row.max())} of {count}")


def _check_one_to_one(slot_row: Tensor, count: int) -> None:
    if slot_row.device.type == "cpu":
        _check_rows("rows", slot_row, count)
        used = slot_row[slot_row >= 0]
        if used.unique().numel() != used.numel():
            raise ValueError("slot_row must not name a row twice")


def _slots(rows: Tensor, slot_row: Tensor, k: int) -> Tensor:
    """The rows of slot k of every token, `[T, d]` in accumulation precision; zero where there is none."""
    dtype = accumulation_dtype(rows.dtype)
    index = slot_row[:, k]
    if rows.shape[0] == 0:
        return rows.new_zeros(index.shape[0], rows.shape[1], dtype=dtype)
    return rows[index.clamp(min=0)].to(dtype).masked_fill_((index < 0)[:, None], 0)


def _combine(rows: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    _check_combine(rows, slot_row, weights)
    _check_one_to_one(slot_row, rows.shape[0])
    out: Tensor | None = None
    for k in range(slot_row.shape[1]):
        term = _slots(rows, slot_row, k)
        if weights is not None:
            term.mul_(weights[:, k, None])
            term.masked_fill_((slot_row[:, k] < 0)[:, None], 0)  # a skipped slot's weight may be NaN
        out = term if out is None else out.add_(term)
    if out is None:
        return rows.new_zeros(slot_row.shape[0], rows.shape[1])
    return out.to(rows.dtype)


def _combine_backward(dout: Tensor, rows: Tensor, slot_row: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_combine_backward(dout, rows, slot_row, weights)
    _check_one_to_one(slot_row, rows.shape[0])
    dweights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    for k in range(slot_row.shape[1]):
        products = _slots(rows, slot_row, k) * dout
        dweights[:, k] = products.sum(-1).masked_fill_(slot_row[:, k] < 0, 0)
    if slot_row.numel() == 0:
        return torch.zeros_like(rows, memory_format=torch.contiguous_format), dweights
    row_slot = inverse(slot_row, rows.shape[0])
    row_weight = weights.reshape(-1)[row_slot.clamp(min=0)].masked_fill_(row_slot < 0, 0)
    return (_permute(dout, row_slot, slot_row) * row_weight[:, None]).to(rows.dtype), dweights


implement("moe_permute", _permute, ANY_DEVICE)
implement("moe_combine", _combine, ANY_DEVICE)
implement("moe_combine_backward", _combine_backward, ANY_DEVICE)


# ------------------------------------------------------------------------------------------------------------ autograd


@torch.library.register_fake("flashmoe::moe_permute", lib=LIBRARY)
def _(x: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    _check_permute(x, row_slot, slot_row)
    return x.new_empty((row_slot.shape[0], x.shape[1]))


@torch.library.register_fake("flashmoe::moe_combine", lib=LIBRARY)
def _(rows: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    _check_combine(rows, slot_row, weights)
    return rows.new_empty((slot_row.shape[0], rows.shape[1]))


@torch.library.register_fake("flashmoe::moe_combine_backward", lib=LIBRARY)
def _(dout: Tensor, rows: Tensor, slot_row: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    _check_combine_backward(dout, rows, slot_row, weights)
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_permute(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _permute_backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
    (slot_row,) = ctx.saved_tensors
    return moe_combine(drows.contiguous(), slot_row, None), None, None


def _setup_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, slot_row, weights = inputs
    # Without weights the gradient needs of the rows only how many there are.
    ctx.save_for_backward(slot_row, *(() if weights is None else (rows, weights)))
    ctx.count = rows.shape[0]


def _combine_autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor | None]:
    slot_row, *weighted = ctx.saved_tensors
    if weighted:
        rows, weights = weighted
        drows, dweights = torch.ops.flashmoe.moe_combine_backward(dout.contiguous(), rows, slot_row, weights)
        return drows, None, dweights
    return moe_permute(dout.contiguous(), inverse(slot_row, ctx.count), slot_row), None, None


torch.library.register_autograd("flashmoe::moe_permute", _permute_backward, setup_context=_setup_permute, lib=LIBRARY)
torch.library.register_autograd("flashmoe::moe_combine", _combine_autograd, setup_context=_setup_combine, lib=LIBRARY)
differentiable_once("moe_combine_backward")
