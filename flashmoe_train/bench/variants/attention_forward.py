"""The study of attention's forward kernel (csrc/attention/forward.cu)."""

import ctypes
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flashmoe_train.bench.attention import FORWARDS
from flashmoe_train.bench.attention_cases import Case
from flashmoe_train.bench.measure import ERROR_BOUND, Contender, relative_error, worst
from flashmoe_train.bench.timing import Run
from flashmoe_train.bench.variants import Launch, Study, Trial, Variant
from flashmoe_train.ops.attention.reference import reference_forward


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "row", "head")]

    @classmethod
    def of(cls, x: Tensor) -> "Strides":
        return cls(*x.stride()[:3])


class Problem(ctypes.Structure):
    """AttentionProblem."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "query_bounds", "key_bounds")),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v")),
        *((name, ctypes.c_int) for name in ("batch", "queries", "keys", "heads", "kv_heads", "dim", "dim_v")),
        *((name, ctypes.c_int) for name in ("documents", "left", "right")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int),
    ]

    @classmethod
    def of(cls, case: Case, q: Tensor, k: Tensor, v: Tensor) -> "Problem":
        strides = map(Strides.of, (q, k, v))
        sizes = (case.b, case.s, k.shape[1], case.h, case.h_kv, case.d, case.dv)
        band = (0, -1, 0 if case.causal else -1)
        return cls(*(x.data_ptr() for x in (q, k, v)), None, None, *strides, *sizes, *band, case.d**-0.5, 0)


class Params(ctypes.Structure):
    """AttentionForwardParams."""

    _anonymous_ = ("problem",)
    _fields_ = [
        ("problem", Problem),
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        ("out_strides", Strides),
        ("workspace", ctypes.c_void_p),
    ]


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Ragged(Case):
    """A check: queries and keys of different lengths, in views of a larger tensor whose other elements are NaN."""

    keys: int = 0
    kind: str = ""  # "loud": scores in the hundreds; "equal": and all keys the same

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{mask} b{self.b} s{self.s}:{self.keys} h{self.h}:{self.h_kv} {self.kind}".rstrip()


def checks(d: int, dv: int) -> list[Ragged]:
    found = [
        Ragged(b=2, s=queries, h=h, h_kv=h_kv, d=d, dv=dv, causal=causal, keys=keys)
        for queries, keys, h, h_kv in (
            (128, 128, 2, 2), (256, 384, 2, 2), (1, 1, 1, 1), (7, 63, 3, 1), (64, 65, 2, 2), (129, 127, 4, 2),
            (300, 40, 2, 2), (64, 700, 2, 1), (1000, 1000, 6, 2), (513, 513, 40, 40),
        )
        for causal in (False, True)
    ]  # fmt: skip
    # What small errors of every step add up to.
    return found + [
        Ragged(b=1, s=256, h=2, h_kv=2, d=d, dv=dv, causal=True, keys=8192, kind=kind) for kind in ("loud", "equal")
    ]


def cases(d: int, dv: int) -> list[Case]:
    return [
        Case(b=16 // k, s=1024 * k, h=2048 // dv, d=d, dv=dv, causal=causal) for causal in (False, True) for k in (1, 4)
    ]


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    beyond: Tensor  # rows that are not out's


def room(shape: tuple[int, int, int, int], device: torch.device, ragged: bool) -> tuple[Tensor, Tensor]:
    """[b, s, h, d] of NaN, ragged: in memory [b, h, s + 3, d]; and the rows beyond it."""
    batch, length, heads, dim = shape
    rows = (heads, length + 3) if ragged else (length, heads)
    whole = torch.full((batch, *rows, dim), math.nan, dtype=torch.bfloat16, device=device)
    whole = whole.transpose(1, 2) if ragged else whole
    return whole[:, :length], whole[:, length:]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: tuple  # what the reference is told besides


def inputs_of(case: Case, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    ragged = isinstance(case, Ragged)
    keys = case.keys if isinstance(case, Ragged) else case.s
    q = room((case.b, case.s, case.h, case.d), device, ragged)[0].normal_()
    k, v = (room((case.b, keys, case.h_kv, dim), device, ragged)[0].normal_() for dim in (case.d, case.dv))
    if isinstance(case, Ragged) and case.kind:
        q.mul_(300)
    if isinstance(case, Ragged) and case.kind == "equal":
        k.copy_(k[:, :1].expand_as(k))
    return Inputs(q, k, v, (case.d**-0.5, -1, 0 if case.causal else -1, None, None, True))


def _prepare(case: Case, device: torch.device) -> Trial:
    q, k, v, mask = inputs_of(case, device)
    out, lse = reference_forward(q.double(), k.double(), v.double(), *mask)

    def run(launch: Launch) -> Run:
        found, beyond = room((case.b, case.s, case.h, case.dv), device, isinstance(case, Ragged))
        found_lse = torch.full((case.b, case.h, case.s), math.nan, device=device)

        def once() -> Result:
            problem = Problem.of(case, q, k, v)
            launch(Params(problem, found.data_ptr(), found_lse.data_ptr(), Strides.of(found)))
            return Result(found, found_lse, beyond)

        return once

    def error(found: Result | Tensor) -> float:
        if isinstance(found, Tensor):
            return relative_error(found, out)
        empty = lse.isneginf()
        if not torch.equal(found.lse.isneginf(), empty) or not found.beyond.isnan().all():
            return math.inf
        far = (found.out.double() - out).abs().max() / out.abs().max().clamp(min=1e-3)  # one element is enough
        off = (found.lse.double() - lse).masked_fill(empty, 0).abs().max()
        mean = relative_error(found.out, out) if out.any() else 0.0  # of what is all zeros nothing is relative
        return worst([mean, far.item(), 10 * off.item()])

    def baseline(name: str) -> Run:
        return partial(FORWARDS[name](case, None), q, k, v)

    baselines: dict[str, Contender] = {name: partial(baseline, name) for name in ("cudnn", "fa3")}
    return Trial(run, baselines, error, ERROR_BOUND[torch.bfloat16], case.flops(backward=False))


# ------------------------------------------------------------------------------------------------------------ variants


def constant(name: str, now: str, then: str) -> tuple[tuple[str, str], ...]:
    return ((f"{name} = {now}", f"{name} = {then}"),)


_PASS = "      ConsumerTurns::pass(warpgroup);\n"
_SCORES = "      wgmma_wait<1>();\n      pin(s);\n"
_VALUES = "      multiply_values<S>(o, p, advance(v, v_step.stage * V_STAGE), i < end - 2);\n      wgmma_commit();\n"
# The turn passes when all has been issued, not when the scores are there; or there is none.
EARLY_TURNS = ((_SCORES + _PASS, _SCORES), (_VALUES, _VALUES + _PASS))
NO_TURNS = (
    ("  ConsumerTurns::start(warpgroup);\n", ""),
    ("      ConsumerTurns::wait(warpgroup);\n      wgmma_fence", "      wgmma_fence"),
    (_SCORES + _PASS, _SCORES),
    ("    ConsumerTurns::wait(warpgroup);\n    ConsumerTurns::pass(warpgroup);\n    shared", "    shared"),
)
# The next tile's scores wait until this one's values have left.
NOT_AHEAD = constant("AHEAD", "WIDTH <= 128", "false")
# The references are the largest scores in every step.
NOT_TRUSTING = (
    (
        "fragment_column(thread));\n\n      // Not later",
        "fragment_column(thread));\n      softmax.raise(s, rescale);\n\n      // Not later",
    ),
    (
        "      if (softmax.too_low(total)) {\n        softmax.raise(s, rescale);\n"
        "        softmax.exponentials<T>(s, p, total);\n",
        "      {\n",
    ),
)
# A warpgroup computes the steps that it does not see too.
NOTHING_SKIPPED = (
    ("return tile.end - tile.begin > 1 && band_of", "return false && band_of"),
    ("i >= begin && tile.row + warpgroup * 64 >= tile.rows; --i) skip_k", "false; --i) skip_k"),
)


def sizes(now: str, then: str) -> tuple[tuple[str, str], ...]:
    """Head dims, queries of a tile and keys of a step."""
    return ((f"forward<T, {now}>", f"forward<T, {then}>"),)


# The stage that a consumer does not give back is waited for by the producer, for ever.
_DEADLOCK = (("      pin(p);\n      release_v();\n", "      pin(p);\n      v_step.next();\n"),)


def study(d: int, variants: dict[str, tuple[tuple[str, str], ...]], dv: int = 0) -> Study:
    dims = d, dv or d
    return Study(
        title=f"Attention, forward, d{d}",
        source="attention/forward.cu",
        function="attention_forward",
        params=Params,
        workspace="attention_forward_workspace",
        variants={name: Variant({"FORWARD_DIM": d}, edits) for name, edits in variants.items()},
        checks=checks(*dims),
        cases=cases(*dims),
        prepare=_prepare,
    )


STUDY = study(
    128,
    {
        "now": (),
        "early_turns": EARLY_TURNS,
        "no_turns": NO_TURNS,
        "not_trusting": NOT_TRUSTING,
        "not_ahead": NOT_AHEAD,
        "no_overlap": (("wgmma_wait<1>();\n      pin(s);", "wgmma_wait<0>();\n      pin(s);"),),
        "keys_96": sizes("128, 128, 128, 128", "128, 128, 128, 96"),
        "keys_176": (*sizes("128, 128, 128, 128", "128, 128, 128, 176"), *NOT_AHEAD),
        "deadlock": _DEADLOCK,
    },
)
