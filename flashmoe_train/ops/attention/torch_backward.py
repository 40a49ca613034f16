"""`attention_backward` on GPUs: by our kernel, or from our out and lse by PyTorch's, until ours takes every case."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.ops.attention.checks import (
    KERNEL_BACKWARD_HEAD_DIMS,
    KERNEL_HEAD_DIMS,
    AttentionCase,
    check_backward,
    refused_by_kernel,
)
from flashmoe_train.ops.attention.fallback import in_document
from flashmoe_train.ops.attention.reference import reference_backward
from flashmoe_train.ops.library import TENSOR_CORE_DTYPES, has_kernel

aten = torch.ops.aten

# Of a tensor: beyond 2^31 - 1 cuDNN's dq is wrong.
_CUDNN_ELEMENTS = 2**31 - 1


def kernel_takes(case: AttentionCase) -> bool:
    """Whether `cuda_backward` is our kernel's."""
    return (
        has_kernel("attention_backward_kernel", case.device_type)
        and refused_by_kernel(case, KERNEL_BACKWARD_HEAD_DIMS) is None
    )


def cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, *mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_backward` by our kernel where it takes the case, which it checks itself, else by `torch_backward`."""
    takes = kernel_takes(AttentionCase.of(q, v, softmax_scale))
    run = torch.ops.flashmoe.attention_backward_kernel if takes else torch_backward
    return run(dout, q, k, v, out, lse, softmax_scale, *mask)


def torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_backward` by cuDNN's kernel for full and square causal attention, by PyTorch's flash kernel for every
    other band, for documents and where the gradients have to repeat bitwise.

    Neither waits for the device. What the forward kernel does not take is the reference's.
    """
    check_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    if q.dtype not in TENSOR_CORE_DTYPES or (q.shape[3], v.shape[3]) not in KERNEL_HEAD_DIMS or softmax_scale <= 0:
        return reference_backward(
            dout, q, k, v, out, lse, softmax_scale, window_left, window_right, cu_seqlens_q, cu_seqlens_k, deterministic
        )
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    # Both kernels read vectors of 16 bytes, which the strides and the first address of a view may not allow.
    dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
    length_q, length_k = q.shape[1], k.shape[1]
    left = -1 if window_left >= length_k - 1 else window_left  # a window that hides nothing
    right = -1 if window_right >= length_q - 1 else window_right
    if cu_seqlens_q is None or cu_seqlens_k is None:
        full, causal = left < 0 and right < 0, left < 0 and right == 0 and length_q == length_k
        # cuDNN's sums have no fixed order; PyTorch does not let it take a sequence of one key either.
        most = max(x[0].numel() for x in (q, k, v, out))
        if (full or causal) and length_k > 1 and most < _CUDNN_ELEMENTS and not deterministic:
            pieces = zip(*(x.split(_CUDNN_ELEMENTS // most) for x in (dout, q, k, v, out, lse)), strict=True)
            dq, dk, dv = zip(*(_cudnn(piece, softmax_scale, causal) for piece in pieces), strict=True)
            return _joined(dq), _joined(dk), _joined(dv)
        # Every sequence of the batch as a document: those can be told that the longest has other lengths.
        cu_seqlens_q, cu_seqlens_k = (
            torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], dtype=torch.int32, device=x.device) for x in (q, k)
        )
    return _flash(dout, q, k, v, out, lse, softmax_scale, left, right, cu_seqlens_q, cu_seqlens_k, deterministic)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _cudnn(tensors: tuple[Tensor, ...], softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`tensors`: dout, q, k, v, out and lse."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in tensors[:5])
    lse = tensors[5]
    unused = q.new_empty(0)  # the state of dropout's random numbers
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.contiguous().unsqueeze(-1), unused, unused, None, None, None, q.shape[2], k.shape[2],
        0.0, causal, scale=softmax_scale,
    )  # fmt: skip
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


def _flash(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    left: int,
    right: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel wants one head dim for all and the lse of a row that sees nothing as +inf, and writes nothing in rows
    of no document."""
    if cu_seqlens_q.shape[0] == 1:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    width = max(q.shape[3], v.shape[3])
    # It takes a side of a window that is as long as the longest document for none, and one that is none for as long as
    # that. Both are right if "the longest" bounds queries and keys; reading the lengths would wait for the device.
    longest = max(q.shape[1], k.shape[1])
    unused = q.new_empty(0)
    with _repeatable(deterministic):
        grads = aten._flash_attention_backward(
            _rows(dout, width), _rows(q, width), _rows(k, width), _rows(v, width), _rows(out, width),
            lse.masked_fill(lse == -math.inf, math.inf).transpose(0, 1).flatten(1).contiguous(),
            cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), longest, longest, 0.0, False, unused, unused,
            scale=softmax_scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
    dq, dk, dv = (
        torch.where(in_document(grad, cu_seqlens), grad, 0.0)[..., : x.shape[3]].contiguous().view(x.shape)
        for grad, x, cu_seqlens in zip(grads, (q, k, v), (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k), strict=True)
    )
    return dq, dk, dv


def _rows(x: Tensor, width: int) -> Tensor:
    """`[B, S, H, D]` as `[B · S, H, width]`."""
    x = x.flatten(0, 1)
    return x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2]))


@contextlib.contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """PyTorch's flash kernel asks the process, not its caller, whether its sums need a fixed order."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(before or wanted, warn_only=warns and not wanted)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warns)
