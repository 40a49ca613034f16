"""`torch.ops.flashmoe.router_topk`: from a router's logits to the experts of each token and their weights.

    scores  "softmax" or "sigmoid" of the logits; "topk_softmax": softmax over the chosen logits alone
    choice  the K largest of score + bias (ties: the lower id); with groups only from the `limited_groups` groups whose
            two best choices have the largest sum (DeepSeek-V3, arXiv:2412.19437)
    weight  the score of the choice, without the bias; divided by the token's sum if `renormalize`; times `scale`

In float32 (float64 for float64 logits). Runs on any device by PyTorch's own operations, on CUDA by a kernel.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flashmoe_train.ops.library import (
    ANY_DEVICE,
    LIBRARY,
    TAGS,
    accumulation_dtype,
    check_finite,
    differentiable_once,
    implement,
    reverse_mode_only,
)
from flashmoe_train.ops.moe.checks import check_matrix

SCORE_FUNCTIONS = ("softmax", "sigmoid", "topk_softmax")
ScoreFunction = Literal["softmax", "sigmoid", "topk_softmax"]
_EPSILON = 1e-20  # of the renormalisation, as in TorchTitan

LIBRARY.define(
    "router_topk(Tensor logits, Tensor? bias, SymInt top_k, str score_function, bool renormalize, float scale,"
    " SymInt groups, SymInt limited_groups, SymInt sequences)"
    " -> (Tensor weights, Tensor ids, Tensor score_sums, Tensor counts)",
    tags=TAGS,
)
LIBRARY.define(
    "router_topk_backward(Tensor dweights, Tensor? dscore_sums, Tensor logits, Tensor ids, str score_function,"
    " bool renormalize, float scale, SymInt sequences) -> Tensor dlogits",
    tags=TAGS,
)


class Routing(NamedTuple):
    """What `router_topk` chooses. Gradients flow to the logits from weights and score_sums."""

    weights: Tensor  # float32 [T, K], best first
    ids: Tensor  # int32 [T, K]
    score_sums: Tensor  # float32 [sequences, E]: sum of the scores of a sequence's tokens, for balancing losses
    counts: Tensor  # int32 [sequences, E]: how many of a sequence's slots chose the expert


def router_topk(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    score_function: ScoreFunction = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    limited_groups: int = 1,
    sequences: int = 1,
) -> Routing:
    """Chooses `top_k` experts for each token.

    Args:
        logits: `[T, E]`, floating point. The CUDA kernels take at most 8192 experts; up to 512 experts and a top_k of
            32 are fast.
        top_k: K, at most E (with groups: at most the experts of `limited_groups` groups).
        bias: `[E]`, added to the scores for the choice only (balancing without a loss, arXiv:2408.15664).
        score_function, renormalize, scale: see the module.
        groups, limited_groups: experts lie in `groups` equal groups, a token takes from `limited_groups` of them.
        sequences: into how many equal, contiguous parts of T the statistics are split.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, shape, dtype, device or value; the message names it.
    """
    # The compiled code's own errors are RuntimeErrors.
    _check(logits, bias, top_k, score_function, groups, limited_groups, sequences)
    check_finite("scale", scale)
    reverse_mode_only("router_topk", logits)
    return Routing(
        *torch.ops.flashmoe.router_topk(
            logits, bias, top_k, score_function, renormalize, scale, groups, limited_groups, sequences
        )
    )


def _check(
    logits: Tensor, bias: Tensor | None, top_k: int, function: str, groups: int, limited: int, sequences: int
) -> None:
    check_matrix("logits", logits)
    experts = logits.shape[1]
    if bias is not None:
        if tuple(bias.shape) != (experts,):
            raise ValueError(f"bias must be [experts] = [{experts}], found {list(bias.shape)}")
        if bias.device != logits.device:
            raise ValueError(f"bias must be on {logits.device}, found {bias.device}")
    if function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function must be one of {SCORE_FUNCTIONS}, found {function!r}")
    if groups < 1 or experts % groups != 0 or (groups > 1 and experts < 2 * groups):
        raise ValueError(f"groups must divide the {experts} experts into groups of at least 2, found {groups}")
    if not 1 <= limited <= groups:
        raise ValueError(f"limited_groups must be between 1 and groups = {groups}, found {limited}")
    if not 1 <= top_k <= experts // groups * limited:
        raise ValueError(f"top_k must be between 1 and {experts // groups * limited}, found {top_k}")
    if sequences < 1 or logits.shape[0] % sequences != 0:
        raise ValueError(f"sequences must divide the {logits.shape[0]} tokens, found {sequences}")


def _scores(logits: Tensor, function: str) -> Tensor:
    """Of all experts; "topk_softmax" has the statistics of "softmax"."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    return wide.sigmoid() if function == "sigmoid" else wide.softmax(1)


def _largest(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, best first; ties go to the lower index, unlike in topk."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _forward(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    groups: int,
    limited_groups: int,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(logits, bias, top_k, score_function, groups, limited_groups, sequences)
    tokens, experts = logits.shape
    scores = _scores(logits, score_function)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        grouped = choice.view(tokens, groups, experts // groups)
        best_groups = _largest(grouped.topk(2).values.sum(-1), limited_groups)
        closed = torch.ones(tokens, groups, dtype=torch.bool, device=logits.device).scatter_(1, best_groups, False)
        choice = grouped.masked_fill(closed[:, :, None], -torch.inf).view(tokens, experts)
    ids = _largest(choice, top_k)
    weights = _weights(logits, scores, ids, score_function)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + _EPSILON)
    counts = torch.zeros(sequences, experts, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, ids.reshape(sequences, -1), torch.ones_like(ids, dtype=torch.int32).view(sequences, -1))
    score_sums = scores.view(sequences, -1, experts).sum(1)
    return weights * scale, ids.int(), score_sums, counts


def _weights(logits: Tensor, scores: Tensor, ids: Tensor, function: str) -> Tensor:
    """Scores of the choices before renormalisation and scale."""
    if function == "topk_softmax":
        return logits.gather(1, ids).to(scores.dtype).softmax(1)
    return scores.gather(1, ids)


def _backward(
    dweights: Tensor,
    dscore_sums: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score_function: str,
    renormalize: bool,
    scale: float,
    sequences: int,
) -> Tensor:
    _tokens, experts = logits.shape
    ids = ids.long()
    scores = _scores(logits, score_function)
    weights = _weights(logits, scores, ids, score_function)
    draw = dweights * scale
    if renormalize:
        total = weights.sum(1, keepdim=True) + _EPSILON
        draw = (draw - (draw * weights).sum(1, keepdim=True) / total) / total
    dscores = torch.zeros_like(scores)
    if dscore_sums is not None:
        dscores.view(sequences, -1, experts).add_(dscore_sums[:, None])
    if score_function != "topk_softmax":
        dscores.scatter_add_(1, ids, draw)
    if score_function == "sigmoid":
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - (dscores * scores).sum(1, keepdim=True))
    if score_function == "topk_softmax":
        dlogits.scatter_add_(1, ids, weights * (draw - (draw * weights).sum(1, keepdim=True)))
    return dlogits.to(logits.dtype)


implement("router_topk", _forward, ANY_DEVICE)
implement("router_topk_backward", _backward, ANY_DEVICE)


@torch.library.register_fake("flashmoe::router_topk", lib=LIBRARY)
def _(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    groups: int,
    limited_groups: int,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(logits, bias, top_k, score_function, groups, limited_groups, sequences)
    tokens, experts = logits.shape
    wide = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((tokens, top_k), dtype=wide),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((sequences, experts), dtype=wide),
        logits.new_empty((sequences, experts), dtype=torch.int32),
    )


@torch.library.register_fake("flashmoe::router_topk_backward", lib=LIBRARY)
def _(
    dweights: Tensor,
    dscore_sums: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score_function: str,
    renormalize: bool,
    scale: float,
    sequences: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.score_function, ctx.renormalize, ctx.scale, _, _, ctx.sequences = inputs
    weights, ids, _, counts = output
    ctx.mark_non_differentiable(ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids)
    ctx.weights_dtype = weights.dtype


def _autograd(ctx: Any, dweights: Tensor | None, dids: None, dscore_sums: Tensor | None, dcounts: None) -> tuple:
    if dweights is None and dscore_sums is None:
        return (None,) * 9
    logits, ids = ctx.saved_tensors
    if dweights is None:
        dweights = torch.zeros(ids.shape, dtype=ctx.weights_dtype, device=ids.device)
    dlogits = torch.ops.flashmoe.router_topk_backward(
        dweights.contiguous(),
        None if dscore_sums is None else dscore_sums.contiguous(),
        logits,
        ids,
        ctx.score_function,
        ctx.renormalize,
        ctx.scale,
        ctx.sequences,
    )
    return (dlogits, *(None,) * 8)


torch.library.register_autograd("flashmoe::router_topk", _autograd, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("router_topk_backward")
