"""What the mixture-of-experts operators accept: everything else is an error that names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashmoe_train.ops.library import accumulation_dtype

SCORE_MODES = ("combine", "activation")

# What the compiled kernels take.
KERNEL_ALIGNMENT = 8  # d and n are multiples of it: 16 bytes
KERNEL_MOST_EXPERTS = 4096


def check_matrix(name: str, x: Tensor) -> None:
    """Raises unless `x` is a floating-point matrix with a contiguous last dimension."""
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, found {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, found {x.dtype}")
    check_contiguous(name, x)


def check_contiguous(name: str, x: Tensor) -> None:
    """Raises unless the last dimension of `x` is contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must have a contiguous last dimension, found strides {tuple(x.stride())}")


def check_indices(name: str, x: Tensor, rank: int, device: torch.device) -> None:
    """Raises unless `x` is an int32 tensor of `rank` dimensions on `device`."""
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimension{'s' * (rank > 1)}, found {list(x.shape)}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, found {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, found {x.device}")


def check_weights(weights: Tensor, shape: Sequence[int], x: Tensor, name: str = "weights") -> None:
    """Raises unless `weights` are of `shape`, on x's device and float32 (float64 beside float64 x)."""
    if list(weights.shape) != list(shape):
        raise ValueError(f"{name} must be {list(shape)}, found {list(weights.shape)}")
    if weights.dtype != accumulation_dtype(x.dtype):
        raise TypeError(f"{name} must be {accumulation_dtype(x.dtype)} beside {x.dtype}, found {weights.dtype}")
    if weights.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, found {weights.device}")


def check_experts(w1: Tensor) -> None:
    """Raises unless w1 has the rank of the experts' weights: the rest is for `check`."""
    if w1.dim() != 3 or w1.shape[0] < 1:
        raise ValueError(f"w1 must be [experts, hidden dim, model dim] of at least one expert, found {list(w1.shape)}")


def check_routing(x: Tensor, w1: Tensor, ids: Tensor) -> None:
    """Raises unless tokens, experts and the experts' ids fit each other: the rest is for `check`."""
    check_matrix("x", x)
    check_experts(w1)
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids must be [tokens, experts per token] = [{x.shape[0]}, ...], found {list(ids.shape)}")
    if ids.device != x.device:
        raise ValueError(f"ids must be on x's device {x.device}, found {ids.device}")


def check(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    score_mode: str,
    dout: Tensor | None = None,
    h: Tensor | None = None,
) -> int:
    """Checks the arguments of `moe_forward`, and of `moe_backward` if `dout` and `h` are given; returns R."""
    check_matrix("x", x)
    if w1.dim() != 3:
        raise ValueError(f"w1 must be [experts, hidden dim, model dim], found {list(w1.shape)}")
    experts, hidden, model = w1.shape
    for name, w, shape in (
        ("w1", w1, (experts, hidden, x.shape[1])),
        ("w2", w2, (experts, model, hidden)),
        ("w3", w3, (experts, hidden, model)),
    ):
        if tuple(w.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, found {list(w.shape)}")
        if w.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, found {w.dtype}")
        if w.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, found {w.device}")
        check_contiguous(name, w)
    if score_mode not in SCORE_MODES:
        raise ValueError(f"score_mode must be one of {SCORE_MODES}, found {score_mode!r}")
    rows = _check_plan(x, experts, offsets, row_slot, slot_row)
    if weights is not None:
        check_weights(weights, x.shape[:1] if slot_row is None else slot_row.shape, x)
        if slot_row is None and score_mode != "activation":
            raise ValueError("weights of rows multiply the activation: score_mode must be 'activation'")
    for name, tensor, wanted in (("dout", dout, (x.shape[0], model)), ("h", h, (rows, 2 * hidden))):
        if tensor is not None:
            _check_like(name, tensor, wanted, x)
    return rows


def check_weight_gradients(
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
) -> int:
    """Checks the arguments of `moe_weight_gradients_`; returns R."""
    check_matrix("x", x)
    if dw1.dim() != 3:
        raise ValueError(f"dw1 must be [experts, hidden dim, model dim], found {list(dw1.shape)}")
    experts, hidden, _ = dw1.shape
    model = x.shape[1]
    check_sums((dw1, dw2, dw3), (experts, hidden, model), x)
    rows = _check_plan(x, experts, offsets, row_slot, slot_row)
    for name, tensor, wanted in (
        ("dout", dout, (x.shape[0], model)),
        ("dh", dh, (rows, 2 * hidden)),
        ("a", a, (rows, hidden)),
    ):
        _check_like(name, tensor, wanted, x)
    return rows


def check_sums(sums: Sequence[Tensor], w1_shape: Sequence[int], x: Tensor) -> None:
    """Raises unless gradients of w1, w2 and w3 can be added to `sums`."""
    experts, hidden, model = w1_shape
    allowed = {x.dtype, accumulation_dtype(x.dtype)}
    for number, dw in enumerate(sums, 1):
        name, shape = f"dw{number}", (experts, model, hidden) if number == 2 else (experts, hidden, model)
        if tuple(dw.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, found {list(dw.shape)}")
        if dw.dtype not in allowed or dw.dtype != sums[0].dtype:
            names = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"dw1, dw2 and dw3 must have one dtype beside {x.dtype}, {names}, found {name} {dw.dtype}")
        if dw.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, found {dw.device}")
        check_contiguous(name, dw)


def _check_like(name: str, tensor: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    check_matrix(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, found {list(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, found {tensor.dtype}")


def _check_plan(x: Tensor, experts: int, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None) -> int:
    check_indices("offsets", offsets, 1, x.device)
    if offsets.shape[0] != experts + 1:
        raise ValueError(f"offsets must be [experts + 1] = [{experts + 1}], found {list(offsets.shape)}")
    if (row_slot is None) != (slot_row is None):
        raise ValueError("row_slot and slot_row must be given together")
    if row_slot is None or slot_row is None:
        return x.shape[0]
    check_indices("row_slot", row_slot, 1, x.device)
    check_indices("slot_row", slot_row, 2, x.device)
    if slot_row.shape[0] != x.shape[0]:
        raise ValueError(f"slot_row must have a row per token of x, found {list(slot_row.shape)} and {list(x.shape)}")
    return row_slot.shape[0]
