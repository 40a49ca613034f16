"""The study of attention's backward kernel (csrc/attention/backward.cu)."""

import ctypes
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmoe_train.bench.attention import FORWARDS
from flashmoe_train.bench.attention_cases import Case
from flashmoe_train.bench.measure import ERROR_BOUND, Contender, worst
from flashmoe_train.bench.timing import Run
from flashmoe_train.bench.variants import Launch, Study, Trial, Variant
from flashmoe_train.bench.variants.attention_forward import Problem, Ragged, Strides, cases, checks, inputs_of, room
from flashmoe_train.ops.attention.reference import reference_backward, reference_forward


class Params(ctypes.Structure):
    """AttentionBackwardParams."""

    _anonymous_ = ("problem",)
    _fields_ = [
        ("problem", Problem),
        *((name, ctypes.c_void_p) for name in ("out", "dout", "lse", "dq", "dk", "dv")),
        *((f"{name}_strides", Strides) for name in ("out", "dout")),
        ("deterministic", ctypes.c_bool),
        ("workspace", ctypes.c_void_p),
    ]


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Deterministic:
    """A case once more, with sums in a fixed order."""

    case: Case

    @property
    def label(self) -> str:
        return f"{self.case.label} deterministic"

    def as_json(self) -> dict[str, Any]:
        return self.case.as_json()


class Result(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    after_dq: Tensor  # what follows it in memory
    after_dk: Tensor
    after_dv: Tensor


def _prepare(asked: Case | Deterministic, device: torch.device) -> Trial:
    deterministic = isinstance(asked, Deterministic)
    case = asked.case if isinstance(asked, Deterministic) else asked
    q, k, v, mask = inputs_of(case, device)
    ragged = isinstance(case, Ragged)
    out, dout = (room((case.b, case.s, case.h, case.dv), device, ragged)[0] for _ in range(2))
    dout.normal_()
    exact_out, exact_lse = reference_forward(q.double(), k.double(), v.double(), *mask)
    out.copy_(exact_out)
    lse = exact_lse.float()
    wanted = reference_backward(dout.double(), q.double(), k.double(), v.double(), exact_out, exact_lse, *mask)

    def run(launch: Launch) -> Run:
        whole = [torch.full((x.numel() + 1024,), math.nan, dtype=torch.bfloat16, device=device) for x in (q, k, v)]
        dq, dk, dv = (x[:-1024].view(y.shape) for x, y in zip(whole, (q, k, v), strict=True))

        def once() -> Result:
            pointers = (x.data_ptr() for x in (out, dout, lse, dq, dk, dv))
            strides = map(Strides.of, (out, dout))
            launch(Params(Problem.of(case, q, k, v), *pointers, *strides, deterministic))
            return Result(dq, dk, dv, *(x[-1024:] for x in whole))

        return once

    def error(found: Result | tuple[Tensor, ...]) -> float:
        if not all(x.isnan().all() for x in found[3:]):
            return math.inf
        errors = []
        for x, y in zip(found, wanted, strict=False):
            off = x.double() - y
            # What is zero by cancellation is measured by the inputs, as in the tests.
            errors.append((off.norm() / y.norm().clamp(min=0.1 * y.numel() ** 0.5)).item())
            errors.append((off.abs().max() / y.abs().max().clamp(min=0.4)).item())  # one element is enough
        return worst(errors)

    def baseline(name: str) -> Run:
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        theirs = FORWARDS[name](case, None)(*inputs)
        return partial(torch.autograd.grad, theirs, inputs, dout, retain_graph=True)

    baselines: dict[str, Contender] = {name: partial(baseline, name) for name in ("cudnn", "fa3")}
    return Trial(run, baselines, error, ERROR_BOUND[torch.bfloat16], case.flops(backward=True))


# ------------------------------------------------------------------------------------------------------------ variants


def study(d: int, variants: dict[str, tuple[tuple[str, str], ...]], dv: int = 0) -> Study:
    dims = d, dv or d
    quiet = [case for case in checks(*dims) if case.kind != "loud"]  # there bfloat16 leaves nothing to compare
    grouped = Case(b=2, s=4096, h=2048 // dims[1], h_kv=2, d=d, dv=dims[1], causal=True)
    return Study(
        title=f"Attention, backward, d{d}",
        source="attention/backward.cu",
        function="attention_backward",
        params=Params,
        workspace="attention_backward_workspace",
        variants={name: Variant({"BACKWARD_DIM": d}, edits) for name, edits in variants.items()},
        checks=[*quiet, *map(Deterministic, quiet)],
        cases=[*cases(*dims), grouped, *map(Deterministic, cases(*dims))],
        prepare=_prepare,
    )


STUDY = study(128, {"now": ()})
