"""The errors of routed experts against float64, one expert at a time: of nothing that is as large as all experts'
weights a float64 copy is ever made."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashmoe_train.bench.measure import relative_error, worst


def forward_error(inputs: Sequence[Tensor], ids: Tensor, out: Tensor) -> float:
    """Relative error of out `[T, d]`; inputs are x, w1, w2, w3, weights."""
    x, w1, w2, w3, weights = inputs
    wanted = torch.zeros_like(x, dtype=torch.float64)
    for expert, slots in _slots(ids, w1.shape[0]):
        token = slots // ids.shape[1]
        gate, up = (x[token].double() @ w[expert].double().T for w in (w1, w3))
        y = (gate * gate.sigmoid() * up) @ w2[expert].double().T
        wanted.index_add_(0, token, y * weights.reshape(-1)[slots, None].double())
    return relative_error(out, wanted)


def gradient_error(inputs: Sequence[Tensor], ids: Tensor, dout: Tensor, found: Sequence[Tensor]) -> float:
    """The largest relative error of the gradients of x, w1, w2, w3 and weights.

    Computed anew for every implementation: the weights' gradients are too large to keep.
    """
    x, w1, w2, w3, weights = inputs
    dx, *dw, dweights = found
    if any(g.shape != w.shape for g, w in zip(dw, (w1, w2, w3), strict=True)):
        return float("inf")
    wanted_dx = torch.zeros_like(x, dtype=torch.float64)
    wanted_dweights = torch.zeros_like(weights, dtype=torch.float64)
    error, norm = (torch.zeros(3, dtype=torch.float64, device=x.device) for _ in range(2))  # squared; of dw1, dw2, dw3
    for expert, slots in _slots(ids, w1.shape[0]):
        token = slots // ids.shape[1]
        e1, e2, e3 = (w[expert].double() for w in (w1, w2, w3))
        rows, dy = x[token].double(), dout[token].double()
        gate, up = rows @ e1.T, rows @ e3.T
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        wanted_dweights.view(-1)[slots] = ((dy @ e2) * activation).sum(1)
        dy *= weights.reshape(-1)[slots, None]
        dactivation = dy @ e2
        dgate, dup = dactivation * up * (sigmoid + silu * (1 - sigmoid)), dactivation * silu
        wanted_dx.index_add_(0, token, dgate @ e1 + dup @ e3)
        for i, wanted in enumerate((dgate.T @ rows, dy.T @ activation, dup.T @ rows)):
            error[i] += (dw[i][expert].double() - wanted).square().sum()
            norm[i] += wanted.square().sum()
    errors = [relative_error(dx, wanted_dx), relative_error(dweights, wanted_dweights)]
    return worst(errors + (error / norm).sqrt().tolist())


def _slots(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert and its slots, token · K + k."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    bounds = accumulate(torch.bincount(flat, minlength=experts).tolist(), initial=0)
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        yield expert, order[begin:end]
