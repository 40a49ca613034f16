"""What the attention operators accept: everything else is an error that names the argument. And what of it the kernel
for Hopper GPUs takes: everything else there is the fallback's."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashmoe_train.ops.library import accumulation_dtype, capability, refused_by_tensor_cores

# D and V.
KERNEL_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))

# The hardware's tensor loads want addresses and strides in multiples of this many bytes, and no stride of 0.
TMA_BYTES = 16


class AttentionCase(NamedTuple):
    """What decides whether the operator has an implementation: everything else it takes as it comes."""

    device_type: str
    capability: str | None  # compute capability of the GPU
    dtype: torch.dtype
    head_dim: int  # D
    head_dim_v: int  # V
    positive_scale: bool = True  # the kernel takes maxima before it scales

    @classmethod
    def of(cls, q: Tensor, v: Tensor, softmax_scale: float) -> "AttentionCase":
        device = q.device
        found = capability(device.type, device.index)
        return cls(device.type, found, q.dtype, q.shape[-1], v.shape[-1], softmax_scale > 0)


def refused_by_kernel(case: AttentionCase) -> str | None:
    """None if the kernels take the case, else the reason why not."""
    takes = "the attention kernel takes"
    if (reason := refused_by_tensor_cores(takes, case.capability, case.dtype)) is not None:
        return reason
    # One comparison at a time: of `in`, torch.compile with a symbolic head_dim makes a formula that it never solves.
    if not any(case.head_dim == d and case.head_dim_v == v for d, v in KERNEL_HEAD_DIMS):
        allowed = ", ".join(f"{d}/{v}" for d, v in KERNEL_HEAD_DIMS)
        return f"{takes} head dims of q and k / of v {allowed}, found {case.head_dim}/{case.head_dim_v}"
    if not case.positive_scale:
        return f"{takes} a softmax_scale above 0"
    return None


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[int, int]:
    """Raises on arguments the operator does not accept; returns (H, G)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, seq, heads, head_dim], found {x.dim()} dimensions: {_shape(x)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, found {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, found {name} {x.dtype} and q {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, found {name} on {x.device} and q on {q.device}")
        if x.shape[3] == 0:
            raise ValueError(f"{name} must have a head_dim of at least 1, found {_shape(x)}")
        if x.stride(3) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, found strides {tuple(x.stride())}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, seq and heads, found k {_shape(k)} and v {_shape(v)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, found q {_shape(q)} and k {_shape(k)}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim, found q {_shape(q)} and k {_shape(k)}")
    heads, groups = q.shape[2], k.shape[2]
    if heads == 0 or groups == 0 or heads % groups != 0:
        raise ValueError(
            f"the heads of q must be a multiple of those of k, and there be some, found {heads} and {groups}"
        )
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if x.dim() != 1 or x.shape[0] < 1:
                raise ValueError(f"{name} must be [documents + 1], found {_shape(x)}")
            if x.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, found {x.dtype}")
            if x.device != q.device:
                raise ValueError(f"{name} must be on q's device {q.device}, found {x.device}")
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must count the same documents, found {_shape(cu_seqlens_q)} and "
                f"{_shape(cu_seqlens_k)}"
            )
        if q.shape[0] != 1:
            raise ValueError(f"with cu_seqlens the batch size must be 1, found q {_shape(q)}")
    return heads, groups


def check_window(window: tuple[int | None, int | None]) -> None:
    sides = window if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or any(
        side is not None and (isinstance(side, float | str | Tensor) or side < 0) for side in sides
    ):
        raise ValueError(f"window must be two non-negative sizes or None, (left, right), found {window}")


def copies(q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
    """Which of q, k and v the kernel for Hopper GPUs copies before it reads them, and why; `{}` if it does none.

    Tensors are those of `flashmoe_train.attention`, `[B, S, H, D]` (packed ones too), bfloat16 or float16, on any
    device; raises as that does. The compiled code has the same rule and decides by its own.
    """
    check(q, k, v, None, None)
    if not (q.numel() and k.numel()):
        return {}
    return {name: why for name, x in (("q", q), ("k", k), ("v", v)) if (why := _unreadable(x))}


def _unreadable(x: Tensor) -> str:
    reasons = []
    if rest := x.data_ptr() % TMA_BYTES:
        reasons.append(f"its address must be a multiple of {TMA_BYTES} bytes, found {rest} more")
    for name, size, stride in zip(("batch", "seq", "heads"), x.shape[:3], x.stride()[:3], strict=True):
        apart = stride * x.element_size()
        if size > 1 and (apart <= 0 or apart % TMA_BYTES):  # the stride of a single one says nothing
            reasons.append(f"its stride over {name} must be a positive multiple of {TMA_BYTES} bytes, found {apart}")
    return "; ".join(reasons)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[int, int]:
    heads, groups = check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    batch, length = q.shape[:2]
    for name, x, shape, dtype in (
        ("dout", dout, (batch, length, heads, v.shape[3]), q.dtype),
        ("out", out, (batch, length, heads, v.shape[3]), q.dtype),
        ("lse", lse, (batch, heads, length), accumulation_dtype(q.dtype)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, found {_shape(x)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, found {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, found {x.device}")
    return heads, groups
