"""Mixture of experts: routed SwiGLU experts, forward and backward, with the gather before and the combine after them.

    out[t] = Σ_k weights[t, k] · W2[e] (silu(W1[e] x[t]) · W3[e] x[t]),    e = ids[t, k]

Shape legend:

    T tokens    K experts per token    E experts    d model dim    n hidden dim of an expert    R = T · K rows

The rows that an expert computes lie side by side: *row* r holds *slot* `row_slot[r]` = token · K + k, and slot (t, k)
is computed in row `slot_row[t, k]`; expert e owns rows `offsets[e]:offsets[e + 1]`. An id outside `0 <= id < E` skips
its slot. Nothing depends on the routing's values on the host: shapes follow from T and K alone.

Method: token-choice routing (Shazeer et al., 2017, arXiv:1701.06538); the six grouped products of forward and backward
with nothing recomputed and no saved copy of the gathered tokens as in SonicMoE (Guo et al., 2025, arXiv:2512.14080).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flashmoe_train.ops.library import capability, has_kernel, refused_by_tensor_cores, reverse_mode_only
from flashmoe_train.ops.moe import fallback
from flashmoe_train.ops.moe.checks import (
    KERNEL_ALIGNMENT,
    KERNEL_MOST_EXPERTS,
    check,
    check_experts,
    check_routing,
    check_sums,
)
from flashmoe_train.ops.moe.experts import moe_forward
from flashmoe_train.ops.moe.gradients import Experts, WeightGradients, Weights, added
from flashmoe_train.ops.moe.plan import RoutePlan, route_plan
from flashmoe_train.ops.moe.router import Routing, router_topk
from flashmoe_train.ops.moe.rows import moe_combine, moe_permute

__all__ = [
    "MoECase",
    "RoutePlan",
    "Routing",
    "ScoreMode",
    "WeightGradients",
    "moe",
    "moe_combine",
    "moe_permute",
    "moe_rows",
    "route_plan",
    "router_topk",
    "supports",
]

ScoreMode = Literal["combine", "activation"]


def moe(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    score_mode: ScoreMode = "combine",
    gradients: WeightGradients | None = None,
) -> Tensor:
    """Routed SwiGLU experts over tokens, with gradients for x, the experts' weights and the router's weights.

    Args:
        x: tokens `[T, d]`, floating point, last dimension contiguous.
        w1: gate projections `[E, n, d]`, in x's dtype and on its device, like w2 and w3.
        w2: down projections `[E, d, n]`.
        w3: up projections `[E, n, d]`.
        ids: experts of each token `[T, K]`, int32 or int64; ids outside `0 <= id < E` are skipped.
        weights: router weights `[T, K]`, float32.
        score_mode: where the router weight multiplies: "combine", the expert's output in float32 (TorchTitan's
            convention), or "activation", the hidden activation (Megatron's). The same function, rounded elsewhere.
        gradients: where backward adds the gradients of w1, w2 and w3; default: they are autograd's.

    Returns:
        `[T, d]` in x's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, shape, dtype, device or stride; the message names it.
        NotImplementedError: an argument carries a forward-mode tangent.

    Runs `torch.ops.flashmoe.moe_forward` where that has an implementation for the case (`supports`), otherwise
    PyTorch's grouped matrix products around the same plan.
    """
    check_routing(x, w1, ids)
    plan = route_plan(ids, w1.shape[0])
    check(x, w1, w2, w3, weights, *plan, score_mode)  # the compiled code's own errors are RuntimeErrors
    reverse_mode_only("moe", x, w1, w2, w3, weights)
    if supports(MoECase.of(x, w1)) is None:
        return _experts(x, w1, w2, w3, weights, plan, score_mode, gradients)
    if gradients is not None:
        w1, w2, w3 = _into(gradients, x, w1, w2, w3)
    return fallback.moe(x, w1, w2, w3, weights, plan, score_mode)


def moe_rows(
    rows: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    *,
    gradients: WeightGradients | None = None,
) -> Tensor:
    """The experts alone, on rows that are sorted by expert already: what an exchange between processes delivers.

    Args:
        rows: `[R, d]`, floating point, last dimension contiguous; expert e owns rows `offsets[e]:offsets[e + 1]`, rows
            from `offsets[E]` on belong to nobody.
        w1, w2, w3: as in `moe`.
        offsets: int32 `[E + 1]`, not decreasing, from 0 to at most R.
        weights: float32 `[R]`, multiplies the hidden activation of each row (score_mode "activation").
        gradients: where backward adds the gradients of w1, w2 and w3; default: they are autograd's.

    Returns:
        `[R, d]` in the dtype of rows; zeros in rows that belong to nobody.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, shape, dtype, device or stride; the message names it.
            The values of offsets are checked on the CPU only: reading them would make a GPU wait.
        NotImplementedError: an argument carries a forward-mode tangent.
    """
    check_experts(w1)
    check(rows, w1, w2, w3, weights, offsets, None, None, "activation")
    reverse_mode_only("moe_rows", rows, w1, w2, w3, weights)
    if supports(MoECase.of(rows, w1)) is None:
        return _experts(rows, w1, w2, w3, weights, (offsets, None, None), "activation", gradients)
    if gradients is not None:
        w1, w2, w3 = _into(gradients, rows, w1, w2, w3)
    return fallback.moe_rows(rows, w1, w2, w3, offsets, weights)


def _experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    weights: Tensor | None,
    plan: RoutePlan | tuple[Tensor, None, None],
    score_mode: ScoreMode,
    gradients: WeightGradients | None,
) -> Tensor:
    inputs = (x, w1, w2, w3, weights, *plan, score_mode)
    if gradients is None:
        return moe_forward(*inputs)[0]
    check_sums(gradients.sums, w1.shape, x)
    return added(Experts, gradients, *inputs)


def _into(gradients: WeightGradients, x: Tensor, *w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_sums(gradients.sums, w[0].shape, x)
    return added(Weights, gradients, *w)


class MoECase(NamedTuple):
    """What decides whether the operator has an implementation: everything else it takes as it comes."""

    device_type: str
    capability: str | None  # compute capability of the GPU
    dtype: torch.dtype
    dim: int  # d
    hidden_dim: int  # n
    experts: int  # E

    @classmethod
    def of(cls, x: Tensor, w1: Tensor) -> "MoECase":
        experts, hidden_dim, dim = w1.shape
        return cls(x.device.type, capability(x.device.type, x.device.index), x.dtype, dim, hidden_dim, experts)


def supports(case: MoECase, *, complete: bool = False) -> str | None:
    """None if `torch.ops.flashmoe.moe_*` can run the case, else the reason why not.

    Of this installation, or of a `complete` one, which has the CUDA library.
    """
    if case.device_type in ("cpu", "meta"):
        return None
    if not has_kernel("moe_forward", case.device_type, complete):
        return f"this installation has no compiled mixture-of-experts kernel for device type {case.device_type!r}"
    takes = "the mixture-of-experts kernels take"
    if (reason := refused_by_tensor_cores(takes, case.capability, case.dtype)) is not None:
        return reason
    for name, dim in (("model dim", case.dim), ("hidden dim", case.hidden_dim)):
        if dim < 1 or dim % KERNEL_ALIGNMENT != 0:
            return f"{takes} a {name} that is a multiple of {KERNEL_ALIGNMENT}, found {dim}"
    if case.experts > KERNEL_MOST_EXPERTS:
        return f"{takes} at most {KERNEL_MOST_EXPERTS} experts, found {case.experts}"
    return None
