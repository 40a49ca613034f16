"""What every process of the bench `expert_parallel` runs: `torchrun ... expert_parallel_worker CASE ROWS_FILE`."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.bench.exchange import AllToAll, DeepEP, Dispatched, PeerCopy
from flashmoe_train.bench.expert_parallel import OPS, Case
from flashmoe_train.bench.measure import ERROR_BOUND, Unavailable, relative_error
from flashmoe_train.bench.moe_reference import forward_error, gradient_error
from flashmoe_train.bench.results import OURS, Row
from flashmoe_train.bench.routing import draw
from flashmoe_train.bench.timing import Run, Stopwatch

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


def grouped_experts(rows: Tensor, experts: list[Tensor], counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).int()
    w1, w2, w3 = (w.transpose(1, 2) for w in experts)
    return F.grouped_mm(F.silu(F.grouped_mm(rows, w1, offs=ends)) * F.grouped_mm(rows, w3, offs=ends), w2, offs=ends)


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
    return max(forward_error(inputs, ids, out), gradient_error(inputs, ids, dout, (dx, dw1, dw2, dw3, dweights)))


def measure(row: Row, runs: dict[str, Callable[[], tuple[Run, float]]], bound: float, stopwatch: Stopwatch) -> None:
    """Checks every run, times the right ones; the slowest process counts."""
    timed: dict[str, Run] = {}
    for name, make in runs.items():
        reason, run, error = "", None, 0.0
        try:
            run, error = make()
        except Exception as problem:  # a peer fails in many ways
            if name == "all_to_all":
                raise
            unavailable = isinstance(problem, Unavailable)
            reason = str(problem) if unavailable else f"{type(problem).__name__}: {problem}".splitlines()[0]
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        if run is None or any(reasons):  # what one process cannot do nobody does
            row.skipped[name] = next(filter(None, reasons))
            continue
        worst = torch.tensor([error], dtype=torch.float64, device=stopwatch.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if worst.item() <= bound:
            row.error[name] = worst.item()
            timed[name] = run
        else:
            row.failed[name] = f"relative error {worst.item():.1e}, allowed {bound:.0e}"
    for name, ms in stopwatch.medians(timed).items():
        slowest = torch.tensor([ms], device=stopwatch.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        row.ms[name] = slowest.item()


def exchange_rows(shape: Shape, stopwatch: Stopwatch) -> dict[str, Row]:
    case = shape.case
    bound = ERROR_BOUND[shape.dtype]
    rows = {op: Row(case={}) for op in OPS[:2]}
    sent = shape.least_bytes
    x, ids, weights = shape.x, shape.ids, shape.weights

    def all_to_all_dispatch() -> tuple[Run, float]:
        exchange = AllToAll(case.E)
        return lambda: exchange.dispatch(x, ids, weights), dispatch_error(
            shape, exchange.dispatch(x, ids, weights), True
        )

    def all_to_all_combine() -> tuple[Run, float]:
        exchange = AllToAll(case.E)
        arrived = exchange.dispatch(x, ids, weights)
        run: Callable[[], Tensor] = lambda: exchange.combine(arrived.rows, arrived)  # noqa: E731
        return run, relative_error(run(), x.double())  # identity experts, and a token's weights sum to one

    deep_ep: list[DeepEP] = []

    def deepep_dispatch() -> tuple[Run, float]:
        deep_ep.append(DeepEP(case.E, case.d))
        error = dispatch_error(shape, deep_ep[0].dispatch(x, ids, weights), False)
        return lambda: deep_ep[0].dispatch(x, ids, weights), error

    def deepep_combine() -> tuple[Run, float]:
        if not deep_ep:
            raise Unavailable(rows[OPS[0]].skipped["deepep"])
        arrived = deep_ep[0].dispatch(x, ids, weights)
        y = deep_ep[0].weighted(arrived)
        run: Callable[[], Tensor] = lambda: deep_ep[0].combine(y, arrived)  # noqa: E731
        return run, relative_error(run(), x.double())

    def peer_copy() -> tuple[Run, float]:
        return PeerCopy(sent // (case.d * x.element_size()), x), 0.0

    def ours() -> tuple[Run, float]:
        raise Unavailable("the operators ep_dispatch and ep_combine do not exist yet")

    for op, all_to_all, deepep in (
        (OPS[0], all_to_all_dispatch, deepep_dispatch),
        (OPS[1], all_to_all_combine, deepep_combine),
    ):
        runs = {OURS: ours, "all_to_all": all_to_all, "deepep": deepep, "peer_copy": peer_copy}
        measure(rows[op], runs, bound, stopwatch)
        rows[op].gb_per_s = {name: sent / ms / 1e6 for name, ms in rows[op].ms.items()}
    return rows


def layer_row(shape: Shape, stopwatch: Stopwatch) -> Row:
    """Dispatch, experts, combine and all gradients; beside it as much expert work without any exchange."""
    row = Row(case={})
    leaves = [x.detach().requires_grad_() for x in (shape.x, *shape.experts, shape.weights)]

    def all_to_all() -> tuple[Run, float]:
        exchange = AllToAll(shape.case.E)

        def run() -> tuple[Tensor, ...]:
            x, *experts, weights = leaves
            arrived = exchange.dispatch(x, shape.ids, weights)
            out = exchange.combine(grouped_experts(arrived.rows, experts, arrived.counts), arrived)
            return out.detach(), *torch.autograd.grad(out, leaves, shape.dout)

        return run, layer_error(shape, run())

    def no_exchange() -> tuple[Run, float]:
        # The rows that arrive here are what this process' experts work on; x is permuted and combined locally.
        local = AllToAllOfOne(shape)
        return local.run, 0.0

    def ours() -> tuple[Run, float]:
        raise Unavailable("the operators ep_dispatch and ep_combine do not exist yet")

    runs = {OURS: ours, "all_to_all": all_to_all, "no_exchange": no_exchange}
    measure(row, runs, ERROR_BOUND[shape.dtype], stopwatch)
    row.gb_per_s = {name: 2 * 2 * shape.least_bytes / ms / 1e6 for name, ms in row.ms.items() if name != "no_exchange"}
    return row


class AllToAllOfOne:
    """The same layer on one process with its own share of the experts: as many rows per expert, nothing exchanged."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(100 + shape.rank)
        case = shape.case
        self.ids, weights = draw(case.T, shape.here, min(case.K, shape.here), 0.0, shape.device)
        self.leaves = [x.detach().requires_grad_() for x in (shape.x, *shape.experts, weights)]
        self.dout = shape.dout

    def run(self) -> tuple[Tensor, ...]:
        x, *experts, weights = self.leaves
        flat = self.ids.reshape(-1)
        order = flat.argsort(stable=True)
        token = order // self.ids.shape[1]
        counts = torch.zeros(len(experts[0]), dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
        y = grouped_experts(x[token], experts, counts) * weights.reshape(-1)[order, None]
        out = torch.zeros_like(x, dtype=torch.float32).index_add(0, token, y).to(x.dtype)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)


def main() -> None:
    case, path = Case(**json.loads(sys.argv[1])), Path(sys.argv[2])
    device = torch.device(case.device, int(os.environ["LOCAL_RANK"]) if case.device == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    one = torch.ones(1, device=device)
    stopwatch = Stopwatch(device, rounds=(ROUNDS, ROUNDS) if case.device == "cuda" else (3, 3))
    stopwatch.align = lambda: dist.all_reduce(one)  # nobody starts a round before the others
    shape = Shape(case, device)
    rows = exchange_rows(shape, stopwatch)
    if case.n:
        rows[OPS[2]] = layer_row(shape, stopwatch)
    if dist.get_rank() == 0:
        path.write_text(json.dumps({op: row.model_dump() for op, row in rows.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
