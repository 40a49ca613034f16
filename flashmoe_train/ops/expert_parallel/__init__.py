"""Experts that are shared by processes: every token travels to the experts of its ids and back.

    out[t] = Σ_r Σ_k weights[t, k] · expert_ids[t, k](x[t])    over ranks r, and the k whose expert is r's

Shape legend, beside that of `flashmoe_train.ops.moe`:

    W ranks (processes of a group)    T tokens of this rank    M tokens that a rank may have at most    E experts of all
    E/W experts here: those of rank r are r · E/W ...    C rows that there is room for here    S = W · M arrived tokens

A token's row goes to each rank that has one of its experts, once however many they are; its ids and weights go along.
Arrived tokens of source s lie in s · M ..., in the order that they have there; what they compute here is `ops.moe` on
them. Each token's results are summed here before they go back, and over ranks, in order, at the owner: nothing is added
in the order of arrival, so results repeat bitwise. Shapes depend on no routing. Two ways to exchange: peer memory
inside a node (`peer`), whose counts and flags stay on the devices, and all_to_all_single of any backend (`collective`),
which is the reference, and the way between nodes.

Method: deduplicated dispatch and combine as in DeepSeek-V3 (DeepSeek-AI, 2024, arXiv:2412.19437).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashmoe_train.ops.expert_parallel.exchange import Exchange, ExchangeCase, supports
from flashmoe_train.ops.expert_parallel.operator import ep_forward, ep_gradients, ep_gradients_, rounded
from flashmoe_train.ops.expert_parallel.plan import ep_plan
from flashmoe_train.ops.moe import ScoreMode, WeightGradients, moe
from flashmoe_train.ops.moe.checks import check_matrix, check_sums, check_weights
from flashmoe_train.ops.moe.gradients import added

__all__ = ["Exchange", "ExchangeCase", "ep_plan", "routed_experts", "supports"]


def routed_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    ids: Tensor,
    weights: Tensor,
    exchange: Exchange,
    layer: str = "experts",
    *,
    score_mode: ScoreMode = "combine",
    gradients: WeightGradients | None = None,
) -> Tensor:
    """`flashmoe_train.moe` with the experts of all ranks; called by all of them, with tokens of their own.

    Args:
        x: tokens `[T, d]`, in the exchange's dtype and on its device; T may differ between ranks, and be 0.
        w1, w3: of the experts here `[E/W, n, d]`, in x's dtype or float32, to which their gradients belong too.
        w2: `[E/W, d, n]`, likewise.
        ids: experts of each token `[T, K]`, of all E, int32 or int64; ids outside `0 <= id < E` are skipped.
        weights: router weights `[T, K]`, float32.
        exchange: what the ranks share.
        layer: whose experts these are: errors and overflows name it.
        score_mode: where the router weight multiplies, as in `moe`.
        gradients: where backward adds the gradients of w1, w2 and w3, as in `moe`, at once: not `delayed`.

    Returns:
        `[T, d]` in x's dtype. Gradients flow to x, w1, w2, w3 and weights; those of w are of all ranks' tokens.

    Raises:
        ValueError, TypeError: an argument does not fit the exchange or the others; the message names it.
        RuntimeError: an earlier exchange has waited for a rank in vain.

    Rows that exceed the exchange's capacity are not computed; `exchange.lost` counts them by layer. What is saved for
    the gradients is x, the experts' pre-activations `[C, 2n]` and index maps: backward brings the tokens here again.
    """
    _check(x, (w1, w2, w3), ids, weights, exchange)
    if exchange.world == 1:
        return moe(x, *rounded(x, w1, w2, w3), ids, weights, score_mode=score_mode, gradients=gradients)
    if ids.dtype == torch.int64:  # of which a part would be an expert's
        ids = torch.where((ids >= 0) & (ids < exchange.experts), ids, -1).int()
    inputs = (gradients, x, w1, w2, w3, ids, weights, exchange, exchange.number_of(layer), score_mode)
    if gradients is None:
        return _RoutedExperts.apply(*inputs)
    if gradients.delayed:
        raise ValueError("gradients must not be delayed: later exchanges overwrite the tokens that they are made from")
    check_sums(gradients.sums, w1.shape, x)
    return added(_RoutedExperts, *inputs)


class _RoutedExperts(torch.autograd.Function):
    """The operators write into memory that the ranks share, which torch.library's own autograd does not take."""

    @staticmethod
    def forward(
        ctx: Any,
        gradients: WeightGradients | None,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        ids: Tensor,
        weights: Tensor,
        exchange: Exchange,
        layer: int,
        score_mode: ScoreMode,
    ) -> Tensor:
        ctx.gradients, ctx.said = gradients, (exchange.name, layer, score_mode)
        out, *computed = ep_forward(x, w1, w2, w3, ids, weights, exchange.order, exchange.lost, *ctx.said)
        ctx.save_for_backward(x, w1, w2, w3, ids, *computed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (dout.contiguous(), *ctx.saved_tensors, *ctx.said)
        if ctx.gradients is None:
            needs = ctx.needs_input_grad[2:5]
            dx, dweights, *dw = ep_gradients(*inputs, needs[1], needs[0] or needs[2])
            dw = [one if need else None for one, need in zip(dw, needs, strict=True)]
        else:
            dx, dweights = ep_gradients_(*ctx.gradients.sums, *inputs)
            dw = [None, None, None]
        return None, dx, *dw, None, dweights, None, None, None


def _check(x: Tensor, w: tuple[Tensor, Tensor, Tensor], ids: Tensor, weights: Tensor, exchange: Exchange) -> None:
    """Before anything is sent: a rank that refuses later leaves the others waiting."""
    check_matrix("x", x)
    if x.shape[1] != exchange.dim or x.shape[0] > exchange.tokens:
        wanted = f"[at most {exchange.tokens}, {exchange.dim}]"
        raise ValueError(f"x must be {wanted} for this exchange, found {list(x.shape)}")
    if x.dtype != exchange.dtype:
        raise TypeError(f"x must be {exchange.dtype} for this exchange, found {x.dtype}")
    for name, tensor in {"x": x, "ids": ids, "w1": w[0], "w2": w[1], "w3": w[2]}.items():
        if tensor.device != exchange.device:
            raise ValueError(f"{name} must be on {exchange.device} for this exchange, found {tensor.device}")
    if list(ids.shape) != [x.shape[0], exchange.top_k]:
        raise ValueError(f"ids must be [{x.shape[0]}, {exchange.top_k}] for this exchange, found {list(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, found {ids.dtype}")
    check_weights(weights, ids.shape, x)
    hidden = w[0].shape[1] if w[0].dim() == 3 else "hidden dim"
    up, down = [exchange.here, hidden, exchange.dim], [exchange.here, exchange.dim, hidden]
    for name, one, shape in zip(("w1", "w2", "w3"), w, (up, down, up), strict=True):
        if list(one.shape) != shape:
            raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], found {list(one.shape)}")
        if one.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must have x's dtype {x.dtype} or be torch.float32, found {one.dtype}")
