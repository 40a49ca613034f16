"""What the tests of the experts' CUDA kernels share: calls that only they can answer, an oracle that is fast enough for
GPUs, bounds of their errors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashmoe_train import moe
from flashmoe_train.bench.measure import relative_error
from flashmoe_train.ops.moe import MoECase, moe_rows, supports

from .moe_cases import Case, backward_by_operators

ops = torch.ops.flashmoe
NAMES = ("out", "dx", "dw1", "dw2", "dw3", "dweights")
DTYPES = [torch.bfloat16, torch.float16]

# Relative error in the Frobenius norm, for shapes of any size; of a single number relative to the largest.
NORM = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
LARGEST = {torch.bfloat16: 4e-2, torch.float16: 5e-3}

# --------------------------------------------------------------------------------------------------------------- oracle


@torch.no_grad()
def exact(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor, ids: Tensor, dout: Tensor
) -> tuple[Tensor, ...]:
    """(out, dx, dw1, dw2, dw3, dweights) in float64 on x's device, one expert at a time; what belongs to no expert is
    not read."""
    out, dx, *dw, dweights = (torch.zeros_like(t, dtype=torch.float64) for t in (x, x, w1, w2, w3, weights))
    for expert, slots in _slots(ids, w1.shape[0]):
        token = slots // ids.shape[1]
        e1, e2, e3 = (w[expert].double() for w in (w1, w2, w3))
        rows, dy, weight = x[token].double(), dout[token].double(), weights.reshape(-1)[slots, None].double()
        gate, up = rows @ e1.T, rows @ e3.T
        sigmoid = gate.sigmoid()
        activation = gate * sigmoid * up
        out.index_add_(0, token, activation @ e2.T * weight)
        da = dy @ e2
        dweights.view(-1)[slots] = (da * activation).sum(1)
        dup = da * weight * gate * sigmoid
        dgate = da * weight * up * sigmoid * (1 + gate * (1 - sigmoid))
        dx.index_add_(0, token, dgate @ e1 + dup @ e3)
        dw[0][expert], dw[1][expert], dw[2][expert] = dgate.T @ rows, (dy * weight).T @ activation, dup.T @ rows
    return out, dx, *dw, dweights


def _slots(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has slots, and these: token · K + k."""
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = flat.argsort(stable=True)
    bounds = accumulate(torch.bincount(flat, minlength=experts + 1).tolist()[:experts], initial=0)
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            yield expert, order[begin:end]


# ---------------------------------------------------------------------------------------------------------------- calls


def kernel(case: Case, ids: Tensor) -> Callable[..., Tensor]:
    """out as a function of x, w1, w2, w3 and weights, by the kernels: where they do not take the case, this fails."""

    def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor) -> Tensor:
        assert supports(MoECase.of(x, w1)) is None
        return moe(x, w1, w2, w3, ids, weights, score_mode=case.score_mode)

    return run


def kernel_rows(offsets: Tensor) -> Callable[..., Tensor]:
    """The same of rows that are sorted by expert; weights may be left out."""

    def run(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor | None = None) -> Tensor:
        assert supports(MoECase.of(rows, w1)) is None
        return moe_rows(rows, w1, w2, w3, offsets, weights)

    return run


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """(out, dx, dw1, dw2, dw3, dweights), the last if weights are among the inputs."""
    x, w1, _, _, *weights = inputs
    rows = weights[0].numel() if weights else x.shape[0]
    spoil(x, w1, rows)
    out = function(*inputs)
    spoil(x, w1, rows)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def by_operators(
    inputs: Sequence[Tensor], plan: Sequence[Tensor | None], score_mode: str, dout: Tensor
) -> tuple[Tensor, ...]:
    """(out, h, dx, dweights, dw1, dw2, dw3) without autograd."""
    x, w1, w2, w3, weights = inputs
    out, h = ops.moe_forward(x, w1, w2, w3, weights, *plan, score_mode)
    return out, h, *backward_by_operators(dout, x, w1, w2, w3, weights, h, *plan, score_mode)


def spoil(x: Tensor, w1: Tensor, rows: int) -> None:
    """Leaves NaN in the memory that the allocator gives to the next call: what that does not write is NaN, and what it
    reads unwritten."""
    (tokens, dim), (experts, hidden, _) = x.shape, w1.shape
    shapes = [(rows, 2 * hidden)] * 2 + [(rows, hidden)] + [(rows, dim)] * 2 + [(tokens, dim)]
    shapes += [(experts, hidden, dim)] * 3
    freed = [torch.full(shape, torch.nan, dtype=x.dtype, device=x.device) for shape in shapes]
    del freed


@dataclass(frozen=True)
class Rows:
    """Rows that are sorted by expert, and after them some of nobody, which hold NaN."""

    inputs: tuple[Tensor, ...]  # rows, w1, w2, w3, weights, that require gradients
    dout: Tensor
    offsets: Tensor  # [E + 1]
    ids: Tensor  # [R, 1]: each row's expert, -1 for nobody's
    nobodys: slice

    @classmethod
    def of(cls, counts: Sequence[int], spare: int, dim: int, hidden: int, dtype: torch.dtype, device: str) -> "Rows":
        """`counts` rows for the experts, `spare` for nobody."""
        used = sum(counts)
        *inputs, weights = Case(used + spare, dim, hidden, len(counts), 1).tensors(dtype, device)
        inputs.append(weights.detach().squeeze(1).requires_grad_())
        dout = torch.randn(used + spare, dim, device=device).to(dtype)
        nobodys = slice(used, used + spare)
        for x in (inputs[0].data, inputs[4].data, dout):
            x[nobodys] = torch.nan
        ids = torch.tensor(
            [e for e, count in enumerate(counts) for _ in range(count)] + [-1] * spare, dtype=torch.int32
        )
        offsets = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)
        return cls(tuple(inputs), dout, offsets.to(device), ids.to(device)[:, None], nobodys)

    def exact(self, weighted: bool) -> tuple[Tensor, ...]:
        """As `exact`, with weights of 1 unless they are meant."""
        *inputs, weights = self.inputs
        weights = weights if weighted else torch.ones_like(weights)
        *wanted, dweights = exact(*inputs, weights[:, None], self.ids, self.dout)
        return (*wanted, dweights.squeeze(1)) if weighted else tuple(wanted)


# --------------------------------------------------------------------------------------------------------------- bounds


def assert_right(label: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """(out, dx, dw1, dw2, dw3, dweights), for shapes of any size: nothing is left out, no single number wrong."""
    dtype, dim = found[0].dtype, found[0].shape[1]
    for name, x, y in zip(NAMES, found, wanted, strict=len(found) == len(NAMES)):
        assert x.shape == y.shape and x.dtype == (torch.float32 if name == "dweights" else dtype), f"{label}: {name}"
        assert not x[y == 0].any(), f"{label}: {name} is not zero where nothing contributes to it"
        if not x.numel():
            continue
        # Single numbers are small by chance, dweights by cancellation: then the scale is what they usually are.
        usual = 0.4 * dim**0.5 if name == "dweights" else 0.05
        few = 5 if name == "dweights" and y.numel() < 64 else 1
        error = x.double() - y
        norm = (error.norm() / max(y.norm().item(), usual * y.numel() ** 0.5)).item()
        assert norm <= few * NORM[dtype], f"{label}: relative error of {name} {norm:.1e}"
        largest = (error.abs().max() / max(y.abs().max().item(), usual)).item()
        assert largest <= few * LARGEST[dtype], f"{label}: largest error of {name} {largest:.1e} of the largest number"


def beyond_contract(found: Sequence[Tensor], wanted: Sequence[Tensor], yardstick: Sequence[Tensor]) -> list[str]:
    """Names and errors of the results whose error in the Frobenius norm is more than 1.2 times the yardstick's."""
    beyond = []
    for name, x, y, other in zip(NAMES, found, wanted, yardstick, strict=True):
        error, allowed = relative_error(x, y), 1.2 * relative_error(other, y)
        if not error <= allowed:  # NaN is not
            beyond.append(f"{name}: {error:.2e}, allowed {allowed:.2e}")
    return beyond
