"""`moe_glu`: the SwiGLU activation of the experts' rows, for where it is no part of the products' kernels.

    out[r] = silu(gate[r]) · up[r] · row_weight[r]

In float32 (float64 for float64 rows), rounded once. Rows from offsets[E] on belong to nobody: zero, in the gradients
too, whatever lies there. Runs on any device by PyTorch's own operations, on CUDA by a kernel.
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

LIBRARY.define("moe_glu(Tensor gate, Tensor up, Tensor offsets, Tensor? row_weight) -> Tensor out", tags=TAGS)
LIBRARY.define(
    "moe_glu_backward(Tensor dout, Tensor gate, Tensor up, Tensor offsets, Tensor? row_weight)"
    " -> (Tensor dgate, Tensor dup, Tensor drow_weight)",
    tags=TAGS,
)


def moe_glu(gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None) -> Tensor:
    """`[R, n]` in gate's dtype.

    `gate` and `up` `[R, n]` may be the halves of one matrix; `offsets` int32 `[E + 1]` as in a RoutePlan; `row_weight`
    float32 `[R]`. Raises ValueError or TypeError that names the argument.
    """
    _check(gate, up, offsets, row_weight)
    reverse_mode_only("moe_glu", gate, up, row_weight)
    return torch.ops.flashmoe.moe_glu(gate, up, offsets, row_weight)


# -------------------------------------------------------------------------------------------------------------- checks


def _check(gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None) -> None:
    check_matrix("gate", gate)
    _check_like_gate("up", up, gate)
    check_indices("offsets", offsets, 1, gate.device)
    if offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [experts + 1], found {list(offsets.shape)}")
    if row_weight is not None:
        check_weights(row_weight, gate.shape[:1], gate, "row_weight")


def _check_like_gate(name: str, x: Tensor, gate: Tensor) -> None:
    check_matrix(name, x)
    if x.shape != gate.shape:
        raise ValueError(f"{name} must be {list(gate.shape)}, found {list(x.shape)}")
    if x.dtype != gate.dtype:
        raise TypeError(f"{name} must be {list(gate.shape)} in the dtype of gate, {gate.dtype}, found {x.dtype}")
    if x.device != gate.device:
        raise ValueError(f"{name} must be on {gate.device}, found {x.device}")


# ----------------------------------------------------------------------------------------------------------- reference


def _nobodys(gate: Tensor, offsets: Tensor) -> Tensor:
    return (torch.arange(gate.shape[0], device=gate.device) >= offsets[-1])[:, None]


def _forward(gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None) -> Tensor:
    _check(gate, up, offsets, row_weight)
    wide = accumulation_dtype(gate.dtype)
    g = gate.to(wide)
    out = g * g.sigmoid() * up
    if row_weight is not None:
        out = out * row_weight[:, None]
    return out.masked_fill_(_nobodys(gate, offsets), 0).to(gate.dtype)


def _backward(
    dout: Tensor, gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(gate, up, offsets, row_weight)
    _check_like_gate("dout", dout, gate)
    wide, nobodys = accumulation_dtype(gate.dtype), _nobodys(gate, offsets)
    d, g, u = (x.to(wide) for x in (dout, gate, up))
    sigmoid = g.sigmoid()
    if row_weight is None:
        drow_weight = gate.new_empty(0, dtype=wide)
    else:
        drow_weight = (d * (g * sigmoid * u)).sum(1).masked_fill_(nobodys[:, 0], 0)
        d = d * row_weight[:, None]
    dgate = (d * u * sigmoid * (1 + g * (1 - sigmoid))).masked_fill_(nobodys, 0)
    dup = (d * (g * sigmoid)).masked_fill_(nobodys, 0)
    return dgate.to(gate.dtype), dup.to(gate.dtype), drow_weight


implement("moe_glu", _forward, ANY_DEVICE)
implement("moe_glu_backward", _backward, ANY_DEVICE)


# ------------------------------------------------------------------------------------------------------------ autograd


@torch.library.register_fake("flashmoe::moe_glu", lib=LIBRARY)
def _(gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None) -> Tensor:
    _check(gate, up, offsets, row_weight)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("flashmoe::moe_glu_backward", lib=LIBRARY)
def _(
    dout: Tensor, gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(gate, up, offsets, row_weight)
    weights = 0 if row_weight is None else gate.shape[0]
    drow_weight = gate.new_empty(weights, dtype=accumulation_dtype(gate.dtype))
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), drow_weight


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
    gate, up, offsets, row_weight = ctx.saved_tensors
    dgate, dup, drow_weight = torch.ops.flashmoe.moe_glu_backward(dout.contiguous(), gate, up, offsets, row_weight)
    return dgate, dup, None, None if row_weight is None else drow_weight


torch.library.register_autograd("flashmoe::moe_glu", _autograd, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("moe_glu_backward")
