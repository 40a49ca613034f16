"""Experts shared by processes against the same experts in one: forward and all gradients, over gloo."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flashmoe_train.ops.expert_parallel import Exchange, ExchangeCase, ep_plan, routed_experts, supports
from flashmoe_train.ops.moe import WeightGradients

from .. import processes
from .moe_cases import Case, oracle

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Shared:
    """A layer's tensors, the same on every rank, and which tokens are whose."""

    routing: str
    tokens: tuple[int, ...]  # of each rank
    per_rank: int = 4  # experts
    dim: int = 16
    hidden: int = 12
    top_k: int = 3

    @property
    def experts(self) -> int:
        return self.per_rank * len(self.tokens)

    def tensors(self, exchange: Exchange | None = None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """(x, w1, w2, w3, weights), ids, dout; of the dtype and on the device of an exchange."""
        # "one": all tokens to one expert; "rank": all to the experts of the last rank; the others are those of Case.
        torch.manual_seed(len(self.routing) + sum(self.tokens))
        routing = "random" if self.routing == "rank" else self.routing
        experts = self.per_rank if self.routing == "rank" else self.experts
        case = Case(sum(self.tokens), self.dim, self.hidden, experts, self.top_k, routing)
        ids = case.ids()
        if self.routing == "rank":
            ids += self.experts - self.per_rank
        *tensors, weights = replace(case, experts=self.experts).tensors()
        dout = torch.randn(sum(self.tokens), self.dim)
        if exchange is not None:
            tensors = [t.detach().to(exchange.device, exchange.dtype) for t in tensors]
            weights, ids = weights.detach().to(exchange.device), ids.to(exchange.device)
            dout = dout.to(exchange.device, exchange.dtype)
        return (*tensors, weights), ids, dout

    def own(self, rank: int) -> tuple[slice, slice]:
        """Of tokens and of experts."""
        first = sum(self.tokens[:rank])
        return slice(first, first + self.tokens[rank]), slice(rank * self.per_rank, (rank + 1) * self.per_rank)


def exchange_for(shared: Shared, **options: Any) -> Exchange:
    sizes = {"experts": shared.experts, "tokens": max(1, *shared.tokens), "dim": shared.dim, "top_k": shared.top_k}
    where = {"dtype": torch.float32, "device": "cpu", "capacity": len(shared.tokens)}
    return Exchange(dist.group.WORLD, **(sizes | where | options))


def run(
    shared: Shared, exchange: Exchange, layer: str = "layer", wide: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """out, dx, dw1, dw2, dw3, dweights of this rank; with the experts' weights, of the same values, in float32."""
    (x, *w, weights), ids, dout = shared.tensors(exchange)
    w = [e.float() if wide else e for e in w]
    tokens, experts = shared.own(dist.get_rank())
    leaves = [t.detach()[own].clone().requires_grad_() for t, own in ((x, tokens), *((e, experts) for e in w))]
    leaves.append(weights.detach()[tokens].clone().requires_grad_())
    out = routed_experts(*leaves[:4], ids[tokens], leaves[4], exchange, layer, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout[tokens], allow_unused="gradients" in options)


def wanted(shared: Shared) -> tuple[Tensor, ...]:
    """The same by one process, which has all experts."""
    leaves, ids, dout = shared.tensors()
    out = oracle(*leaves, ids)
    grads = torch.autograd.grad(out, leaves, dout.double())
    tokens, experts = shared.own(dist.get_rank())
    own = (tokens, tokens, experts, experts, experts, tokens)
    return tuple(t.detach()[part].float() for t, part in zip((out, *grads), own, strict=True))


def check_equals_one_process(tokens: list[tuple[int, ...]]) -> None:
    for counts in tokens:
        for routing in ("random", "zipf", "one", "rank", "skipped", "nobody", "duplicate"):
            shared = Shared(routing, counts)
            exchange = exchange_for(shared)
            found = run(shared, exchange)
            for name, a, b in zip(("out", "dx", "dw1", "dw2", "dw3", "dweights"), found, wanted(shared), strict=True):
                torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, c=(name, shared): f"{c}: {m}")
            again = run(shared, exchange)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), shared
            assert not exchange.lost.any(), shared
            exchange.close()


def check_ids() -> None:
    """Ids that are no expert's are skipped, however large; those that name an expert twice are computed twice."""
    shared = Shared("duplicate", (5, 7), per_rank=2, top_k=4)
    exchange = exchange_for(shared, capacity=2.0)
    (x, *w, weights), ids, _ = shared.tensors()
    tokens, experts = shared.own(dist.get_rank())
    for strange in (-(2**63), -(2**32), 2**32 + 1, 2**62, shared.experts):
        ids = ids.long()
        ids[::2, 0] = strange
        out = routed_experts(x[tokens], *(e[experts] for e in w), ids[tokens], weights[tokens], exchange)
        torch.testing.assert_close(out, oracle(x, *w, weights, ids)[tokens].float(), **TOLERANCE)
    ids = torch.zeros_like(ids)
    out = routed_experts(x[tokens], *(e[experts] for e in w), ids[tokens], weights[tokens], exchange)
    torch.testing.assert_close(out, oracle(x, *w, weights, ids)[tokens].float(), **TOLERANCE)
    assert not exchange.lost.any()


def check_added(shared: Shared, where: dict[str, Any]) -> None:
    """Gradients of weights are added, to sums in float32 too; weights may multiply the activation."""
    exchange, names = exchange_for(shared, **where), ("out", "dx", "dw1", "dw2", "dw3", "dweights")
    plain = run(shared, exchange, score_mode="activation")
    sums = [torch.ones_like(dw, dtype=torch.float32) for dw in plain[2:5]]
    for _ in range(2):
        out, dx, *none, dweights = run(shared, exchange, score_mode="activation", gradients=WeightGradients(*sums))
        assert none == [None] * 3
    found = out, dx, *((dw - 1) / 2 for dw in sums), dweights
    allowed = 1e-5 if exchange.dtype == torch.float32 else 2e-2
    for name, a, b, c in zip(names, found, plain, wanted(shared), strict=True):
        assert (a - b).norm() <= allowed * b.norm(), name
        assert (b.float().cpu() - c).norm() <= allowed * c.norm(), name
    if exchange.dtype != torch.float32:
        assert not torch.equal(sums[0], sums[0].to(exchange.dtype).float())
        elsewhere = run(shared, exchange)[0]  # are the weights rounded: seen by whoever has tokens
        assert not len(elsewhere) or not torch.equal(plain[0], elsewhere)
    with pytest.raises(ValueError, match="gradients must not be delayed"):
        run(shared, exchange, gradients=WeightGradients(*sums, delayed=True))
    with pytest.raises(ValueError, match="dw2 must be"):
        run(shared, exchange, gradients=WeightGradients(sums[0], sums[0], sums[2]))


def check_frozen(shared: Shared, where: dict[str, Any]) -> None:
    """Gradients of frozen weights are not computed; the others are what they were."""
    exchange = exchange_for(shared, **where)
    before = run(shared, exchange)
    (x, *w, weights), ids, dout = shared.tensors(exchange)
    tokens, experts = shared.own(dist.get_rank())
    for frozen, products in (((0,), 12), ((1,), 10), ((0, 2), 8), ((0, 1, 2), 6)):
        own = [e[experts].clone().requires_grad_(i not in frozen) for i, e in enumerate(w)]
        leaves = [x[tokens].clone().requires_grad_(), weights[tokens].clone().requires_grad_()]
        out = routed_experts(leaves[0], *own, ids[tokens], leaves[1], exchange)
        with FlopCounterMode(display=False) as counter:
            out.backward(dout[tokens])
        assert counter.get_total_flops() == products * ids[tokens].numel() * shared.hidden * shared.dim
        assert torch.equal(leaves[0].grad, before[1]) and torch.equal(leaves[1].grad, before[5])
        for i, e in enumerate(own):
            assert e.grad is None if i in frozen else torch.equal(e.grad, before[2 + i])


def check_wide(shared: Shared, where: dict[str, Any]) -> None:
    """Float32 weights are rounded by the operators, and their gradients are not."""
    exchange = exchange_for(shared, **where)
    narrow, wide = run(shared, exchange), run(shared, exchange, wide=True)
    for name, a, b in zip(("out", "dx", "dw1", "dw2", "dw3", "dweights"), narrow, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
        if name.startswith("dw") and name != "dweights":
            assert b.dtype == torch.float32 and not torch.equal(a.float(), b), name


class Layers(nn.Module):
    """Layers that share an exchange: memory that one had saved would be overwritten by the next."""

    def __init__(self, exchange: Exchange, shared: Shared, wrap: Callable | None, compiled: bool = False) -> None:
        super().__init__()
        self.exchange, self.wrap = exchange, wrap
        (_, *w, weights), ids, _ = shared.tensors(exchange)
        tokens, experts = shared.own(dist.get_rank())
        self.w = nn.ParameterList(e.detach()[experts].clone() for e in w)
        self.routing = ids[tokens], weights.detach()[tokens]
        self.call = torch.compile(self.layer, fullgraph=True) if compiled else self.layer

    def layer(self, x: Tensor) -> Tensor:
        w1, w2, w3 = (self.w[i] for i in range(3))  # torch.compile of 2.11 cannot unpack them
        ids, weights = self.routing
        return x + routed_experts(torch.tanh(x), w1, w2, w3, ids, weights, self.exchange)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.call(x) if self.wrap is None else self.wrap(self.call, x)
        return x


def check_layers(shared: Shared, exchange: Exchange, compiled: bool) -> None:
    """Activation recompute, two microbatches in flight, accumulated gradients and torch.compile change nothing."""
    tokens, _ = shared.own(dist.get_rank())
    x = shared.tensors(exchange)[0][0].detach()[tokens]

    def gradients(wrap: Callable | None, in_flight: bool, compiled: bool = False) -> list[Tensor]:
        model = Layers(exchange, shared, wrap, compiled)
        pieces = [x, 2 * x]
        if in_flight:
            losses = [model(piece).square().sum() for piece in pieces]
            for loss in losses:
                loss.backward()
        else:
            for piece in pieces:
                model(piece).square().sum().backward()
        return [w.grad for w in model.w]

    plain = gradients(None, False)
    recompute = lambda layer, piece: checkpoint(layer, piece, use_reentrant=False)  # noqa: E731
    for wrap, in_flight in ((None, True), (recompute, False), (recompute, True)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(wrap, in_flight), plain, strict=True))
    if compiled:
        # What lies between the layers is rounded less often when it is compiled.
        allowed = 1e-5 if exchange.dtype == torch.float32 else 2e-2
        for a, b in zip(gradients(None, True, True), plain, strict=True):
            assert (a - b).norm() <= allowed * b.norm()


def check_overflow(where: dict[str, Any], sizes: dict[str, int]) -> None:
    """What there is no room for is left out of its layer and counted there; the rest is right."""
    shared = Shared("rank", (6, 6), **sizes)
    exchange = exchange_for(shared, capacity=1.0, **where)
    run(Shared("nobody", (6, 6), **sizes), exchange, "first")
    out = run(shared, exchange, "second")[0]
    last = dist.get_rank() == 1
    assert exchange.rows == 18 and exchange.layers == ["first", "second"]
    assert exchange.lost.tolist()[:3] == [0, 18 if last else 0, 0]
    full = wanted(shared)[0]
    assert not torch.allclose(out.float().cpu(), full, atol=0.1) and out.isfinite().all()


def check_errors() -> None:
    shared = Shared("random", (5, 5))
    exchange = exchange_for(shared)
    (x, *w, weights), ids, _ = shared.tensors()
    tokens, experts = shared.own(dist.get_rank())
    x, ids, weights, *w = x[tokens], ids[tokens], weights[tokens], *(e[experts] for e in w)
    for changed, text in (
        ({"x": x.repeat(2, 1)}, r"x must be \[at most 5, 16\] for this exchange, found \[10, 16\]"),
        ({"x": x.double()}, "x must be torch.float32 for this exchange, found torch.float64"),
        ({"ids": ids[:, :2]}, r"ids must be \[5, 3\]"),
        ({"ids": ids.float()}, "ids must be int32 or int64"),
        ({"weights": weights.double()}, "weights must be torch.float32"),
        ({"w3": w[2].double()}, "w3 must have x's dtype torch.float32 or be torch.float32, found torch.float64"),
        ({"w1": w[0][:2]}, r"w1 must be \[4, 12, 16\], found \[2, 12, 16\]"),
        ({"w1": w[0][0]}, r"w1 must be \[4, hidden dim, 16\], found \[12, 16\]"),
        ({"w2": w[0]}, r"w2 must be \[4, 16, 12\], found \[4, 12, 16\]"),
        ({"w3": w[2][:, :8]}, r"w3 must be \[4, 12, 16\], found \[4, 8, 16\]"),
        ({"ids": ids.to("meta")}, "ids must be on cpu for this exchange, found meta"),
        ({"w2": w[1].to("meta")}, "w2 must be on cpu for this exchange, found meta"),
    ):
        arguments = {"x": x, "w1": w[0], "w2": w[1], "w3": w[2], "ids": ids, "weights": weights} | changed
        with pytest.raises((ValueError, TypeError), match=text):
            routed_experts(**arguments, exchange=exchange)
    for options, text in (
        ({"experts": 7}, "experts must be a multiple of the 2 ranks, found 7"),
        ({"tokens": 0}, "tokens must be at least 1, found 0"),
        ({"capacity": 0.0}, "capacity and timeout must be positive"),
    ):
        sizes = {"experts": 8, "tokens": 5, "dim": 16, "top_k": 3, "dtype": torch.float32, "device": "cpu"} | options
        with pytest.raises(ValueError, match=text):
            Exchange(dist.group.WORLD, **sizes)


def check_two() -> None:
    check_equals_one_process([(9, 5), (0, 7)])
    shared = Shared("random", (9, 7))
    check_layers(shared, exchange_for(shared), compiled=True)
    check_overflow({}, {})
    for dtype in (torch.float32, torch.bfloat16):
        check_added(shared, {"dtype": dtype})
        check_frozen(shared, {"dtype": dtype})
    check_wide(shared, {"dtype": torch.bfloat16})
    check_ids()
    check_errors()


def check_four() -> None:
    check_equals_one_process([(5, 0, 8, 3)])


@pytest.mark.parametrize("function, count", [(check_two, 2), (check_four, 4)])
def test_shared_experts(function: Callable[[], None], count: int) -> None:
    processes.run(function, processes=count)


def test_plan() -> None:
    ids = torch.tensor([[0, 3], [1, 0], [-1, 4], [2, 2]], dtype=torch.int32)
    position, counts = ep_plan(ids, 4, 2)
    assert position.tolist() == [[0, 0], [1, -1], [-1, -1], [-1, 1]]
    assert counts.tolist() == [2, 2]
    torch.library.opcheck(torch.ops.flashmoe.ep_plan.default, (ids, 4, 2))
    with pytest.raises(ValueError, match="experts must be a multiple of the ranks, found 5 for 2"):
        ep_plan(ids, 5, 2)
    with pytest.raises(TypeError, match=r"ids must be int32, found torch\.int64"):
        ep_plan(ids.long(), 4, 2)


def test_supports() -> None:
    case = ExchangeCase("cpu", None, torch.float32, 16, 12, 8, 2)
    assert supports(case) is None
    assert supports(case._replace(world=3)) == "experts must be shared evenly, found 8 experts on 3 ranks"
    on_ampere = case._replace(device_type="cuda", capability="8.0", dtype=torch.bfloat16)
    assert "compute capability 9.0" in (supports(on_ampere, complete=True) or "")
