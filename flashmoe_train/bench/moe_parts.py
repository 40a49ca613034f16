"""The bench `moe_parts`: what surrounds the experts' products and is bound by memory, beside a plain copy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.bench.measure import (
    DTYPES,
    ERROR_BOUND,
    Contender,
    OperatorBench,
    Problem,
    compiled,
    relative_error,
    worst,
)
from flashmoe_train.bench.moe import sorted_slots
from flashmoe_train.bench.moe_cases import SHAPES, draw
from flashmoe_train.bench.timing import Run
from flashmoe_train.ops.library import has_kernel
from flashmoe_train.ops.moe import RoutePlan, moe_combine, moe_permute, route_plan, router_topk
from flashmoe_train.ops.moe.glu import moe_glu

OPS = (
    "router_topk",
    "router_topk_backward",
    "route_plan",
    "moe_permute",
    "moe_glu",
    "moe_glu_backward",
    "moe_combine",
    "moe_combine_unweighted",
    "moe_combine_backward",
)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    T: int
    d: int
    E: int
    K: int
    n: int = 0  # of moe_glu
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        return f"{self.op} {self.name}"

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("op", "T", "d", "E", "K")}
        fields |= {"n": self.n} if "glu" in self.op else {}
        return fields | ({"dtype": self.dtype} if self.dtype != "bf16" else {})

    @property
    def least_bytes(self) -> float:
        """Every input read once, every output written once. R = T · K; maps are int32, weights float32."""
        rows, element = self.T * self.K, DTYPES[self.dtype].itemsize
        tokens_data, rows_data, per_slot = self.T * self.d * element, rows * self.d * element, 4 * rows
        logits, activation = self.T * self.E * element, rows * self.n * element
        return {
            "router_topk": logits + 2 * per_slot + 8 * self.E,  # logits; weights, ids, score_sums, counts
            "router_topk_backward": 2 * logits
            + 2 * per_slot
            + 4 * self.E,  # logits, dlogits; dweights, ids; dscore_sums
            "moe_glu": 3 * activation,  # gate, up; out
            "moe_glu_backward": 5 * activation,  # dout, gate, up; dgate, dup
            "route_plan": 3 * per_slot + 4 * (self.E + 1),  # ids; row_slot, slot_row, offsets
            "moe_permute": tokens_data + rows_data + per_slot,  # x; rows; row_slot
            "moe_combine": rows_data + tokens_data + 2 * per_slot,  # rows; out; slot_row, weights
            "moe_combine_unweighted": rows_data + tokens_data + per_slot,  # rows; out; slot_row
            "moe_combine_backward": tokens_data + 2 * rows_data + 3 * per_slot,  # dout; rows, drows; weights twice, map
        }[self.op]


_STANDARD = [Case(op, name, T, d, E, K, n) for op in OPS for name, (T, d, n, E, K) in SHAPES.items()]
_TINY = [Case(op, "tiny", 40, 24, 6, 3, 16) for op in OPS]


@dataclass(frozen=True)
class Data:
    ids: Tensor
    weights: Tensor
    plan: RoutePlan  # the reference's
    x: Tensor  # [T, d]: tokens, or the gradient of the result
    rows: Tensor  # [R, d]
    logits: Tensor  # [T, E]
    h: Tensor  # [R, 2n]: gate and up of moe_glu; no elements for others

    @property
    def token(self) -> Tensor:
        """Of each row; what a plan in PyTorch's own indices would hold."""
        return self.plan.row_slot.long() // self.ids.shape[1]


def _prepare(case: Case, device: torch.device) -> Problem:
    torch.manual_seed(0)
    ids, weights = draw(case.T, case.E, case.K, 0.0, device)
    x = torch.randn(case.T, case.d, device=device, dtype=DTYPES[case.dtype])
    rows = torch.randn(case.T * case.K, case.d, device=device, dtype=DTYPES[case.dtype])
    logits = torch.randn(case.T, case.E, device=device, dtype=DTYPES[case.dtype])
    h = torch.randn(case.T * case.K, 2 * case.n if "glu" in case.op else 0, device=device, dtype=DTYPES[case.dtype])
    contenders, error = _PROBLEMS[case.op](Data(ids, weights, _plan(ids, case.E), x, rows, logits, h), case.E)
    exact = case.op in ("route_plan", "moe_permute")  # nothing is computed, only moved
    kernel = has_kernel(case.op.removesuffix("_unweighted"), device.type)
    return Problem(
        contenders=contenders,
        error=error,
        error_bound=0.0 if exact else ERROR_BOUND[torch.float32 if case.op == "router_topk" else x.dtype],
        work=case.least_bytes,
        flashmoe_path="kernel" if kernel else "reference",
        floors={} if case.op == "route_plan" else {"copy": partial(_copy, case, device)},
    )


def _plan(ids: Tensor, experts: int) -> RoutePlan:
    """On the host, from the definition of a stable sort by expert."""
    flat = ids.reshape(-1).long().cpu()
    order = flat.argsort(stable=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(flat, minlength=experts).cumsum(0)])
    slot_row = torch.empty_like(order)
    slot_row[order] = torch.arange(order.numel())
    plan = offsets, order, slot_row.view(ids.shape)
    return RoutePlan(*(part.int().to(ids.device) for part in plan))


def _copy(case: Case, device: torch.device) -> Run:
    """As many bytes as the operator's, half of them read and half written: what the memory can do."""
    source = torch.randint(256, (int(case.least_bytes / 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# ----------------------------------------------------------------------------------------------------------- problems
# Each: (what is timed, by name; the error of its result). PyTorch's ways get the indices in the form they want.

Contest = tuple[dict[str, Contender], Callable[[Any], float]]


def _router(data: Data, experts: int) -> Contest:
    logits, top_k = data.logits, data.ids.shape[1]

    def eager() -> tuple[Tensor, ...]:
        scores = logits.float().softmax(1)
        weights, ids = scores.topk(top_k)
        flat = ids.reshape(-1)
        counts = torch.zeros(experts, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return weights / weights.sum(1, keepdim=True), ids, scores.sum(0), counts

    scores = logits.double().softmax(1)
    best = scores.topk(top_k).values

    def error(found: Any) -> float:
        weights, ids, sums, counts = found
        if not torch.equal(counts.reshape(-1).long(), ids.reshape(-1).bincount(minlength=experts)):
            return math.inf
        pairs = (
            (weights, best / best.sum(1, keepdim=True)),
            (scores.gather(1, ids.long()), best),  # of equal scores any expert will do
            (sums.reshape(-1), scores.sum(0)),
        )
        return worst(relative_error(x, y) for x, y in pairs)

    contenders: dict[str, Contender] = {
        "flashmoe": lambda: lambda: router_topk(logits, top_k, renormalize=True),
        "eager": lambda: eager,
        "compiled": partial(compiled, eager, logits.device),
    }
    return contenders, error


def _router_backward(data: Data, experts: int) -> Contest:
    logits, ids, dweights = data.logits, data.ids.int(), data.weights
    index, dsums = ids.long(), torch.randn(1, experts, device=logits.device)

    def eager() -> Tensor:
        scores = logits.float().softmax(1)
        weights = scores.gather(1, index)
        total = weights.sum(1, keepdim=True)
        of_weights = (dweights - (dweights * weights).sum(1, keepdim=True) / total) / total
        dscores = dsums.repeat(len(logits), 1).scatter_add_(1, index, of_weights)
        return (scores * (dscores - (dscores * scores).sum(1, keepdim=True))).to(logits.dtype)

    leaf = logits.double().requires_grad_()
    scores = leaf.softmax(1)
    weights = scores.gather(1, index)
    results = weights / weights.sum(1, keepdim=True), scores.sum(0, keepdim=True)
    (wanted,) = torch.autograd.grad(results, leaf, (dweights.double(), dsums.double()))
    contenders: dict[str, Contender] = {
        "flashmoe": lambda: (
            lambda: torch.ops.flashmoe.router_topk_backward(dweights, dsums, logits, ids, "softmax", True, 1.0, 1)
        ),
        "eager": lambda: eager,
        "compiled": partial(compiled, eager, logits.device),
    }
    return contenders, lambda found: relative_error(found, wanted)


def _route_plan(data: Data, experts: int) -> Contest:
    ids, plan = data.ids, data.plan

    def torch_sort() -> tuple[Tensor, ...]:
        order, ends = sorted_slots(ids, experts)
        slot_row = torch.empty_like(order)
        slot_row[order] = torch.arange(order.numel(), device=order.device)
        return torch.cat([ends.new_zeros(1), ends]), order, slot_row.view(ids.shape)

    def error(found: Any) -> float:
        return worst(relative_error(x, y.double()) for x, y in zip(found, plan, strict=True))

    return {"flashmoe": lambda: lambda: route_plan(ids, experts), "torch_sort": lambda: torch_sort}, error


def _permute(data: Data, experts: int) -> Contest:
    x, token, plan = data.x, data.token, data.plan
    contenders: dict[str, Contender] = {
        "flashmoe": lambda: lambda: moe_permute(x, plan.row_slot, plan.slot_row),
        "gather": lambda: lambda: x[token],
        "compiled": partial(compiled, lambda: x[token], x.device),
    }
    # In x's dtype: a float64 copy of the rows would be four times as large, and equal is equal.
    return contenders, lambda found: 0.0 if torch.equal(found, x[token]) else relative_error(found, x[token].double())


def _glu(data: Data, experts: int) -> Contest:
    gate, up = data.h.chunk(2, 1)

    def eager() -> Tensor:
        return F.silu(gate) * up

    contenders: dict[str, Contender] = {
        "flashmoe": lambda: lambda: moe_glu(gate, up, data.plan.offsets, None),
        "eager": lambda: eager,
        "compiled": partial(compiled, eager, gate.device),
    }
    return contenders, lambda found: relative_error(found, F.silu(gate.double()) * up)


def _glu_backward(data: Data, experts: int) -> Contest:
    gate, up = data.h.chunk(2, 1)
    dout = torch.randn_like(gate, memory_format=torch.contiguous_format)

    def gradients(dout: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(dout * up, gate), dout * F.silu(gate)

    def eager() -> tuple[Tensor, Tensor]:
        return gradients(dout, gate)

    def error(found: Any) -> float:
        wanted = gradients(dout.double(), gate.double())
        return worst(relative_error(x, y) for x, y in zip(found[:2], wanted, strict=True))

    contenders: dict[str, Contender] = {
        "flashmoe": lambda: lambda: torch.ops.flashmoe.moe_glu_backward(dout, gate, up, data.plan.offsets, None),
        "eager": lambda: eager,
        "compiled": partial(compiled, eager, gate.device),
    }
    return contenders, error


def _combine(data: Data, experts: int, weighted: bool) -> Contest:
    rows, token, slot_row = data.rows, data.token, data.plan.slot_row
    weights = data.weights if weighted else None
    index, tokens = slot_row.long(), len(slot_row)
    row_weight = data.weights.reshape(-1)[data.plan.row_slot.long(), None]

    def gather() -> Tensor:
        slots = rows[index]
        return (slots.sum(1) if weights is None else (slots * weights[:, :, None]).sum(1)).to(rows.dtype)

    def index_add() -> Tensor:
        terms = rows.float() if weights is None else rows * row_weight
        return torch.zeros(tokens, rows.shape[1], device=rows.device).index_add_(0, token, terms).to(rows.dtype)

    wanted = torch.zeros(tokens, rows.shape[1], dtype=torch.float64, device=rows.device)
    for k in range(index.shape[1]):  # one slot of every token at a time
        wanted += rows[index[:, k]].double() * (1.0 if weights is None else weights[:, k, None])
    contenders: dict[str, Contender] = {
        "flashmoe": lambda: lambda: moe_combine(rows, slot_row, weights),
        "gather": lambda: gather,
        "compiled": partial(compiled, gather, rows.device),
        "index_add": lambda: index_add,
    }
    return contenders, lambda found: relative_error(found, wanted)


def _combine_backward(data: Data, experts: int) -> Contest:
    dout, rows, token, weights, slot_row = data.x, data.rows, data.token, data.weights, data.plan.slot_row
    index = slot_row.long()
    row_weight = weights.reshape(-1)[data.plan.row_slot.long(), None]

    def gather() -> tuple[Tensor, Tensor]:
        gathered = dout[token]
        dweight = (gathered.float() * rows).sum(1)
        return (gathered * row_weight).to(rows.dtype), dweight[index]

    def error(found: Any) -> float:
        drows, dweights = found
        squares = torch.zeros(2, 2, dtype=torch.float64, device=rows.device)  # of (drows, dweights): error, norm
        for k in range(index.shape[1]):
            wanted = dout.double() * weights[:, k, None]
            products = (dout.double() * rows[index[:, k]]).sum(1)
            for i, (x, y) in enumerate(((drows[index[:, k]], wanted), (dweights[:, k], products))):
                squares[i] += torch.stack([(x.double() - y).square().sum(), y.square().sum()])
        return worst((squares[:, 0] / squares[:, 1]).sqrt().tolist())

    contenders: dict[str, Contender] = {
        "flashmoe": lambda: lambda: torch.ops.flashmoe.moe_combine_backward(dout, rows, slot_row, weights),
        "gather": lambda: gather,
        "compiled": partial(compiled, gather, rows.device),
    }
    return contenders, error


_PROBLEMS: dict[str, Callable[[Data, int], Contest]] = {
    "router_topk": _router,
    "router_topk_backward": _router_backward,
    "route_plan": _route_plan,
    "moe_permute": _permute,
    "moe_glu": _glu,
    "moe_glu_backward": _glu_backward,
    "moe_combine": partial(_combine, weighted=True),
    "moe_combine_unweighted": partial(_combine, weighted=False),
    "moe_combine_backward": _combine_backward,
}

BENCHES = (
    OperatorBench(
        name="moe_parts",
        title="Parts of a mixture of experts that memory bounds",
        rate="gb_per_s",
        standard=_STANDARD,
        tiny=_TINY,
        prepare=_prepare,
        in_microseconds=True,
    ),
)
