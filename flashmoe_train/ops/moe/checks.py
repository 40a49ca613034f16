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
    """Raises unless the last dimension of `x` is contiguous. An empty tensor is, whatever its strides: autograd expands
    gradients of sums, and `contiguous()` leaves empty ones so."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
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
) -> int:
    """Checks the arguments of `moe_forward`; returns R."""
    check_matrix("x", x)
    _check_rank("w1", w1, _UP)
    experts, hidden, model = w1.shape
    _check_of_experts("w1", w1, (experts, hidden, x.shape[1]), "x", x)
    _check_of_experts("w2", w2, (experts, model, hidden), "x", x)
    _check_of_experts("w3", w3, (experts, hidden, model), "x", x)
    rows = _check_tokens("x", x, experts, offsets, row_slot, slot_row)
    _check_router_weights(weights, score_mode, x, slot_row)
    return rows


def check_down_backward(
    dout: Tensor,
    w2: Tensor,
    weights: Tensor | None,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    score_mode: str,
) -> int:
    """Checks the arguments of `moe_down_backward`; returns R."""
    check_matrix("dout", dout)
    _check_rank("w2", w2, _DOWN)
    experts, model, hidden = w2.shape
    rows = _check_tokens("dout", dout, experts, offsets, row_slot, slot_row)
    _check_like("dout", dout, (dout.shape[0], model), "dout", dout)
    _check_of_experts("w2", w2, (experts, model, hidden), "dout", dout)
    _check_router_weights(weights, score_mode, dout, slot_row)
    _check_like("h", h, (rows, 2 * hidden), "dout", dout)
    return rows


def check_up_backward(
    dh: Tensor, w1: Tensor, w3: Tensor, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> int:
    """Checks the arguments of `moe_up_backward`; returns how many rows its result has: T, or R without a plan."""
    check_matrix("dh", dh)
    _check_rank("w1", w1, _UP)
    experts, hidden, model = w1.shape
    _check_plan(dh.device, experts, offsets, row_slot, slot_row)
    rows = dh.shape[0] if row_slot is None else row_slot.shape[0]
    _check_like("dh", dh, (rows, 2 * hidden), "dh", dh)
    _check_of_experts("w1", w1, (experts, hidden, model), "dh", dh)
    _check_of_experts("w3", w3, (experts, hidden, model), "dh", dh)
    return rows if slot_row is None else slot_row.shape[0]


def check_weight_gradient_down(
    dw2: Tensor, dout: Tensor, a: Tensor, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> int:
    """Checks the arguments of `moe_weight_gradient_down_`; returns R."""
    check_matrix("dout", dout)
    _check_rank("dw2", dw2, _DOWN)
    experts, _, hidden = dw2.shape
    rows = _check_tokens("dout", dout, experts, offsets, row_slot, slot_row)
    _check_like("a", a, (rows, hidden), "dout", dout)
    _check_sums({"dw2": dw2}, (experts, hidden, dout.shape[1]), dout)
    return rows


def check_weight_gradient_up(
    dw1: Tensor,
    dw3: Tensor,
    x: Tensor,
    dh: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
) -> int:
    """Checks the arguments of `moe_weight_gradient_up_`; returns R."""
    check_matrix("x", x)
    _check_rank("dw1", dw1, _UP)
    experts, hidden, _ = dw1.shape
    rows = _check_tokens("x", x, experts, offsets, row_slot, slot_row)
    _check_like("dh", dh, (rows, 2 * hidden), "x", x)
    _check_sums({"dw1": dw1, "dw3": dw3}, (experts, hidden, x.shape[1]), x)
    return rows


def check_sums(sums: Sequence[Tensor], w1_shape: Sequence[int], x: Tensor) -> None:
    """Raises unless gradients of w1, w2 and w3 can be added to `sums`."""
    _check_sums(dict(zip(("dw1", "dw2", "dw3"), sums, strict=True)), w1_shape, x)


def _check_sums(sums: dict[str, Tensor], w1_shape: Sequence[int], x: Tensor) -> None:
    experts, hidden, model = w1_shape
    allowed = {x.dtype, accumulation_dtype(x.dtype)}
    dtype = next(iter(sums.values())).dtype
    for name, dw in sums.items():
        shape = (experts, model, hidden) if name == "dw2" else (experts, hidden, model)
        if tuple(dw.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, found {list(dw.shape)}")
        if dw.dtype not in allowed or dw.dtype != dtype:
            names = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{', '.join(sums)} must have one dtype beside {x.dtype}, {names}, found {name} {dw.dtype}")
        if dw.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, found {dw.device}")
        check_contiguous(name, dw)


_UP, _DOWN = "[experts, hidden dim, model dim]", "[experts, model dim, hidden dim]"


def _check_rank(name: str, w: Tensor, shape: str) -> None:
    if w.dim() != 3:
        raise ValueError(f"{name} must be {shape}, found {list(w.shape)}")


def _check_of_experts(name: str, w: Tensor, shape: tuple[int, int, int], other: str, x: Tensor) -> None:
    if tuple(w.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, found {list(w.shape)}")
    _check_beside(name, w, other, x)
    check_contiguous(name, w)


def _check_like(name: str, tensor: Tensor, shape: tuple[int, int], other: str, x: Tensor) -> None:
    check_matrix(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, found {list(tensor.shape)}")
    _check_beside(name, tensor, other, x)


def _check_beside(name: str, tensor: Tensor, other: str, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have {other}'s dtype {x.dtype}, found {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {other}'s device {x.device}, found {tensor.device}")


def _check_router_weights(weights: Tensor | None, score_mode: str, x: Tensor, slot_row: Tensor | None) -> None:
    if score_mode not in SCORE_MODES:
        raise ValueError(f"score_mode must be one of {SCORE_MODES}, found {score_mode!r}")
    if weights is not None:
        check_weights(weights, x.shape[:1] if slot_row is None else slot_row.shape, x)
        if slot_row is None and score_mode != "activation":
            raise ValueError("weights of rows multiply the activation: score_mode must be 'activation'")


def _check_tokens(
    name: str, x: Tensor, experts: int, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> int:
    """Of tokens, or of rows where there is no plan. Returns R."""
    _check_plan(x.device, experts, offsets, row_slot, slot_row)
    if row_slot is None or slot_row is None:
        return x.shape[0]
    if slot_row.shape[0] != x.shape[0]:
        found = f"{list(slot_row.shape)} and {list(x.shape)}"
        raise ValueError(f"slot_row must have a row per token of {name}, found {found}")
    return row_slot.shape[0]


def _check_plan(
    device: torch.device, experts: int, offsets: Tensor, row_slot: Tensor | None, slot_row: Tensor | None
) -> None:
    check_indices("offsets", offsets, 1, device)
    if offsets.shape[0] != experts + 1:
        raise ValueError(f"offsets must be [experts + 1] = [{experts + 1}], found {list(offsets.shape)}")
    if (row_slot is None) != (slot_row is None):
        raise ValueError("row_slot and slot_row must be given together")
    if row_slot is not None and slot_row is not None:
        check_indices("row_slot", row_slot, 1, device)
        check_indices("slot_row", slot_row, 2, device)
