"""Inputs and the oracle of the mixture-of-experts tests.

The oracle gathers every slot's own expert weights and sums in float64, gradients by autograd: no sorting, no rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.bench.moe_cases import draw


@dataclass(frozen=True)
class Case:
    tokens: int = 23
    dim: int = 16
    hidden: int = 12
    experts: int = 5
    top_k: int = 2
    # random | one (all slots to expert 1) | even | skipped (some ids out of range) | nobody (all) | duplicate | zipf
    routing: str = "random"
    score_mode: str = "combine"

    def __str__(self) -> str:
        changed = {k: v for k, v in self.__dict__.items() if v != type(self).__dataclass_fields__[k].default}
        return " ".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def ids(self, device: str = "cpu") -> Tensor:
        shape = (self.tokens, self.top_k)
        if self.routing == "one":
            ids = torch.full(shape, min(1, self.experts - 1))
        elif self.routing == "even":
            ids = torch.arange(self.tokens * self.top_k).view(shape) % self.experts
        elif self.routing == "duplicate":
            ids = torch.randint(self.experts, (self.tokens, 1)).expand(shape)
        elif self.routing == "skipped":
            ids = torch.randint(-2, self.experts + 2, shape)
        elif self.routing == "nobody":
            ids = torch.full(shape, self.experts)
        elif self.routing == "zipf":  # steeper than Zipf's law
            ids, _ = draw(self.tokens, self.experts, self.top_k, 1.5, torch.device("cpu"))
        else:
            ids = torch.rand(self.tokens, self.experts).argsort(1)[:, : self.top_k]
        return ids.to(torch.int32).to(device)

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
        """x, w1, w2, w3, weights with gradients required."""
        e, n, d = self.experts, self.hidden, self.dim
        shapes = ((self.tokens, d), (e, n, d), (e, d, n), (e, n, d))
        weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = [torch.randn(s, dtype=torch.float64, device=device) for s in shapes]
        tensors = [(x * (x.shape[-1] ** -0.5 if x.dim() > 2 else 1)).to(dtype) for x in tensors]
        tensors.append(torch.rand(self.tokens, self.top_k, dtype=weights_dtype, device=device))
        return tuple(x.requires_grad_() for x in tensors)


def oracle(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """out [T, d] in float64 on the CPU, differentiable."""
    x, w1, w2, w3, weights = (t.to("cpu", torch.float64) for t in (x, w1, w2, w3, weights))
    ids = ids.cpu().long()
    used = (ids >= 0) & (ids < w1.shape[0])
    own = torch.where(used, ids, 0)
    gate, up = (torch.einsum("td,tknd->tkn", x, w[own]) for w in (w1, w3))
    y = torch.einsum("tkn,tkdn->tkd", F.silu(gate) * up, w2[own])
    return (y * torch.where(used, weights, 0.0)[:, :, None]).sum(1)


# The operators that one backward runs, each once.
BACKWARD = ("moe_down_backward", "moe_weight_gradient_down", "moe_up_backward", "moe_weight_gradient_up")


def backward_by_operators(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    weights: Tensor | None,
    h: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    score_mode: str,
    keep_rows: bool = False,
) -> tuple[Tensor, ...]:
    """(dx, dweights, dw1, dw2, dw3) without autograd."""
    ops, plan = torch.ops.flashmoe, (offsets, row_slot, slot_row)
    dh, a, dweights, dy = ops.moe_down_backward(dout, w2, weights, h, *plan, score_mode, keep_rows)
    kept = keep_rows and row_slot is not None
    dw2 = ops.moe_weight_gradient_down(*((dy, a, offsets, None, None) if kept else (dout, a, *plan)))
    dw1, dw3 = ops.moe_weight_gradient_up(x, dh, *plan)
    return ops.moe_up_backward(dh, w1, w3, *plan), dweights, dw1, dw2, dw3


def parts_of_backward(forward: tuple, dout: Tensor, h: Tensor | None = None) -> dict[str, tuple]:
    """The operators that backward is made of, and what each is given after `moe_forward` was given `forward`."""
    ops = torch.ops.flashmoe
    x, w1, w2, w3, weights, *plan, score_mode = (t.detach() if isinstance(t, Tensor) else t for t in forward)
    if h is None:
        _, h = ops.moe_forward(x, w1, w2, w3, weights, *plan, score_mode)
    down = dout, w2, weights, h, *plan, score_mode
    dh, a, *_ = ops.moe_down_backward(*down, False)
    return {
        "moe_down_backward": (*down, True),
        "moe_up_backward": (dh, w1, w3, *plan),
        "moe_weight_gradient_down": (dout, a, *plan),
        "moe_weight_gradient_up": (x, dh, *plan),
    }


CASES = [
    Case(),
    Case(score_mode="activation"),
    Case(tokens=0),
    Case(tokens=1),
    Case(top_k=1),
    Case(top_k=5),  # every expert for every token
    Case(experts=1, top_k=1),
    Case(experts=64, top_k=8, tokens=40),  # many experts without a token
    Case(routing="one"),
    Case(routing="one", score_mode="activation"),
    Case(routing="even"),
    Case(routing="duplicate", top_k=3),
    Case(routing="skipped"),
    Case(routing="skipped", score_mode="activation"),
    Case(routing="nobody"),
    Case(routing="zipf"),
    Case(tokens=129, dim=24, hidden=40),
    Case(dim=40, hidden=24),  # few enough columns for backward to keep dout's rows
    Case(dim=40, hidden=24, routing="skipped", score_mode="activation"),
]
