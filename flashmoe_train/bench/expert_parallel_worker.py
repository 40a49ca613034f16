"""What every process of the bench `expert_parallel` runs: `torchrun ... expert_parallel_worker CASE DEVICE FILE`."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train import moe
from flashmoe_train.bench.exchange import AllToAll, DeepEP, Dispatched, Ours, PeerCopy
from flashmoe_train.bench.expert_parallel import OPS, Case
from flashmoe_train.bench.measure import ERROR_BOUND, accept, reason, relative_error, worst
from flashmoe_train.bench.moe import grouped, grouped_experts
from flashmoe_train.bench.moe_cases import draw
from flashmoe_train.bench.moe_reference import forward_error, gradient_error
from flashmoe_train.bench.results import OURS, Row
from flashmoe_train.bench.timing import Run, Stopwatch
from flashmoe_train.ops.expert_parallel import ep_plan, routed_experts

T = TypeVar("T")

ROUNDS = 20  # the same on every process: all of them have to take part in every round


class Shape:
    """A shape's tensors on this process, and what all processes hold together."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.rank, self.here = dist.get_rank(), case.E // case.W
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(self.rank)
        self.ids, self.weights = draw(case.T, case.E, case.K, 0.0, device)
        self.x, self.dout = (torch.randn(case.T, case.d, device=device).to(self.dtype) for _ in range(2))
        sizes = ((case.n, case.d), (case.d, case.n), (case.n, case.d)) if case.n else ()  # w1, w2, w3
        self.experts = [torch.randn(self.here, *s, device=device).mul_(s[1] ** -0.5).to(self.dtype) for s in sizes]

    @property
    def least_bytes(self) -> int:
        """Of the tokens this process sends: each once to each other process that needs it."""
        ranks = F.one_hot((self.ids // self.here).long(), self.case.W).amax(1)
        ranks[:, self.rank] = 0
        return int(ranks.sum()) * self.case.d * self.x.element_size()


def gathered(x: Tensor) -> Tensor:
    """x of all processes, one after the other."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def dispatch_error(shape: Shape, found: Dispatched, by_expert: bool) -> float:
    """Against the tokens of all processes, gathered: the same rows in the same order, so exactly zero."""
    x, ids = gathered(shape.x), gathered(shape.ids)
    own = range(shape.rank * shape.here, (shape.rank + 1) * shape.here)
    if by_expert:
        wanted = torch.cat([x[(ids == expert).nonzero()[:, 0]] for expert in own])
    else:
        wanted = x[((ids >= own.start) & (ids < own.stop)).any(1)]
    return relative_error(found.rows, wanted.double())


def layer_error(shape: Shape, results: tuple[Tensor, ...]) -> float:
    """The largest error of out and of all gradients, over the tokens and experts of all processes together."""
    out, dx, dw1, dw2, dw3, dweights = (gathered(result) for result in results)
    inputs = [gathered(x) for x in (shape.x, *shape.experts, shape.weights)]
    ids, dout = gathered(shape.ids), gathered(shape.dout)
    return worst([forward_error(inputs, ids, out), gradient_error(inputs, ids, dout, (dx, dw1, dw2, dw3, dweights))])


Contender = Callable[[], tuple[Run, Callable[[], float]]]  # sets up; (what is timed, the error of its result)


def measure(row: Row, contenders: dict[str, Contender], bound: float, stopwatch: Stopwatch) -> None:
    """Checks every contender, times the right ones; the slowest process counts."""
    timed: dict[str, Run] = {}
    for name, contender in contenders.items():
        why = ""
        try:
            run, error = contender()
        except Exception as problem:  # a peer fails in many ways
            why = reason(problem)
        # What one process cannot set up nobody runs. One that fails later leaves the others waiting: the bench gives
        # all of them a time limit.
        if reasons := [why for why in everybodys(why) if why]:
            row.skipped[name] = reasons[0]
            continue
        if accept(name, worst(everybodys(error())), bound, row):
            timed[name] = run
    for name, ms in stopwatch.medians(timed).items():
        row.ms[name] = max(everybodys(ms))


def everybodys(value: T) -> list[T]:
    """What each process holds."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def exchange_rows(shape: Shape, stopwatch: Stopwatch) -> dict[str, Row]:
    case = shape.case
    bound = ERROR_BOUND[shape.dtype]
    rows = {op: Row() for op in OPS[:2]}
    sent = shape.least_bytes
    x, ids, weights = shape.x, shape.ids, shape.weights

    def made() -> Ours:
        return Ours(case.E, case.T, case.d, case.K, x)

    def ours_dispatch() -> tuple[Run, Callable[[], float]]:
        exchange = made()
        run = partial(exchange.dispatch, x, ids, weights)

        def error() -> float:
            arrived = run()
            return dispatch_error(shape, arrived._replace(rows=exchange.tokens(arrived)), by_expert=False)

        return run, error

    def ours_transport() -> tuple[Run, Callable[[], float]]:
        exchange, plan = made(), ep_plan(ids, case.E, case.W)
        run = partial(exchange.transport, x, ids, weights, *plan)

        def error() -> float:
            arrived = run()
            tokens = exchange.tokens(Dispatched(arrived.rows, arrived.counts, None))
            return dispatch_error(shape, Dispatched(tokens, arrived.counts, None), by_expert=False)

        return run, error

    def ours_combine() -> tuple[Run, Callable[[], float]]:
        exchange = made()
        arrived = exchange.dispatch(x, ids, weights)
        run = partial(exchange.combine, exchange.rows(arrived), arrived)
        return run, lambda: relative_error(run(), x.double())

    def ours_transport_back() -> tuple[Run, Callable[[], float]]:
        exchange = made()
        arrived = exchange.dispatch(x, ids, weights)
        run = partial(exchange.transport_back, exchange.summed(exchange.rows(arrived), arrived), arrived)
        return run, lambda: relative_error(run(), x.double())

    def all_to_all_dispatch() -> tuple[Run, Callable[[], float]]:
        exchange = AllToAll(case.E)
        run = partial(exchange.dispatch, x, ids, weights)
        return run, lambda: dispatch_error(shape, run(), by_expert=True)

    def all_to_all_combine() -> tuple[Run, Callable[[], float]]:
        exchange = AllToAll(case.E)
        arrived = exchange.dispatch(x, ids, weights)
        run = partial(exchange.combine, arrived.rows, arrived)
        return run, lambda: relative_error(run(), x.double())  # identity experts; a token's weights sum to one

    def deepep_dispatch() -> tuple[Run, Callable[[], float]]:
        run = partial(DeepEP(case.E, case.d).dispatch, x, ids, weights)
        return run, lambda: dispatch_error(shape, run(), by_expert=False)

    def deepep_combine() -> tuple[Run, Callable[[], float]]:
        exchange = DeepEP(case.E, case.d)
        arrived = exchange.dispatch(x, ids, weights)
        run = partial(exchange.combine, exchange.weighted(arrived), arrived)
        return run, lambda: relative_error(run(), x.double())

    def peer_copy() -> tuple[Run, Callable[[], float]]:
        return PeerCopy(sent // (case.d * x.element_size()), x), lambda: 0.0

    for op, ours, transport, all_to_all, deepep in (
        (OPS[0], ours_dispatch, ours_transport, all_to_all_dispatch, deepep_dispatch),
        (OPS[1], ours_combine, ours_transport_back, all_to_all_combine, deepep_combine),
    ):
        contenders = {OURS: ours, "flashmoe_transport": transport, "all_to_all": all_to_all}
        contenders |= {"deepep_transport": deepep, "peer_copy": peer_copy}
        measure(rows[op], contenders, bound, stopwatch)
        rows[op].gb_per_s = {name: sent / ms / 1e6 for name, ms in rows[op].ms.items()}
    return rows


def layer_row(shape: Shape, stopwatch: Stopwatch) -> Row:
    """Dispatch, experts, combine and all gradients; beside it as much expert work without any exchange."""
    row = Row()
    leaves = [x.detach().requires_grad_() for x in (shape.x, *shape.experts, shape.weights)]

    def ours() -> tuple[Run, Callable[[], float]]:
        case = shape.case
        exchange = Ours(case.E, case.T, case.d, case.K, shape.x).exchange

        def forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor) -> Tensor:
            return routed_experts(x, w1, w2, w3, shape.ids, weights, exchange)

        run = partial(with_gradients, forward, leaves, shape.dout)
        return run, lambda: layer_error(shape, run())

    def all_to_all() -> tuple[Run, Callable[[], float]]:
        exchange = AllToAll(shape.case.E)

        def forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor) -> Tensor:
            arrived = exchange.dispatch(x, shape.ids, weights)
            y = grouped_experts(arrived.rows, w1, w2, w3, arrived.counts.cumsum(0).int())
            return exchange.combine(y, arrived)

        run = partial(with_gradients, forward, leaves, shape.dout)
        return run, lambda: layer_error(shape, run())

    def no_exchange(layer: Callable[..., Tensor]) -> tuple[Run, Callable[[], float]]:
        # On one process with its own share of the experts: as many rows per expert, nothing exchanged.
        torch.manual_seed(100 + shape.rank)
        ids, weights = draw(shape.case.T, shape.here, min(shape.case.K, shape.here), 0.0, shape.device)
        forward = lambda x, w1, w2, w3, weights: layer(x, w1, w2, w3, ids, weights)  # noqa: E731
        return partial(with_gradients, forward, [*leaves[:4], weights.requires_grad_()], shape.dout), lambda: 0.0

    contenders = {OURS: ours, "all_to_all": all_to_all}
    contenders |= {"no_exchange": partial(no_exchange, grouped), "flashmoe_no_exchange": partial(no_exchange, moe)}
    measure(row, contenders, ERROR_BOUND[shape.dtype], stopwatch)
    row.gb_per_s = {
        name: 2 * 2 * shape.least_bytes / ms / 1e6 for name, ms in row.ms.items() if "no_exchange" not in name
    }
    return row


def with_gradients(forward: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    out = forward(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def main() -> None:
    case, on_gpus, path = Case(**json.loads(sys.argv[1])), sys.argv[2] == "cuda", Path(sys.argv[3])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    one = torch.ones(1, device=device)
    rounds = (ROUNDS, ROUNDS) if on_gpus else (3, 3)
    stopwatch = Stopwatch(device, rounds=rounds, align=lambda: dist.all_reduce(one))
    shape = Shape(case, device)
    rows = exchange_rows(shape, stopwatch)
    if case.n:
        rows[OPS[2]] = layer_row(shape, stopwatch)
    if dist.get_rank() == 0:
        path.write_text(json.dumps({op: row.model_dump(exclude_defaults=True) for op, row in rows.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
