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


class Params(ctypes.Structure):
    """AttentionForwardParams."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "next_tile")),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int) for name in ("batch", "queries", "keys", "heads", "kv_heads", "dim")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
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


CHECKS = [
    Ragged(b=2, s=queries, h=h, h_kv=h_kv, d=128, causal=causal, keys=keys)
    for queries, keys, h, h_kv in (
        (128, 128, 2, 2), (256, 384, 2, 2), (1, 1, 1, 1), (7, 63, 3, 1), (64, 65, 2, 2), (129, 127, 4, 2),
        (300, 40, 2, 2), (64, 700, 2, 1), (1000, 1000, 6, 2), (513, 513, 40, 40),
    )
    for causal in (False, True)
]  # fmt: skip
# What small errors of every step add up to.
CHECKS += [Ragged(b=1, s=256, h=2, h_kv=2, d=128, causal=True, keys=8192, kind=kind) for kind in ("loud", "equal")]
CASES = [Case(b=16 // k, s=1024 * k, h=16, d=128, causal=causal) for causal in (False, True) for k in (1, 4, 8, 16)]


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    beyond: Tensor  # rows that are not out's


def _tensor(batch: int, length: int, heads: int, device: torch.device, ragged: bool) -> tuple[Tensor, Tensor]:
    """[b, s, h, d] of NaN, ragged: in memory [b, h, s + 3, d]; and the rows beyond it."""
    extra = 3 if ragged else 0
    shape = (batch, heads, length + extra) if ragged else (batch, length, heads)
    whole = torch.full((*shape, 128), math.nan, dtype=torch.bfloat16, device=device)
    whole = whole.transpose(1, 2) if ragged else whole
    return whole[:, :length], whole[:, length:]


def _prepare(case: Case, device: torch.device) -> Trial:
    torch.manual_seed(0)
    ragged = isinstance(case, Ragged)
    keys = case.keys if isinstance(case, Ragged) else case.s
    q = _tensor(case.b, case.s, case.h, device, ragged)[0].normal_()
    k, v = (_tensor(case.b, keys, case.h_kv, device, ragged)[0].normal_() for _ in range(2))
    if isinstance(case, Ragged) and case.kind:
        q.mul_(300)
    if isinstance(case, Ragged) and case.kind == "equal":
        k.copy_(k[:, :1].expand_as(k))
    mask = (case.d**-0.5, -1, 0 if case.causal else -1, None, None, True)
    out, lse = reference_forward(q.double(), k.double(), v.double(), *mask)

    def run(launch: Launch) -> Run:
        found, beyond = _tensor(case.b, case.s, case.h, device, ragged)
        found_lse = torch.full((case.b, case.h, case.s), math.nan, device=device)
        next_tile = torch.zeros(1, dtype=torch.int32, device=device)
        tensors = (q, k, v, found)
        sizes = (case.b, case.s, keys, case.h, case.h_kv, case.d)

        def once() -> Result:
            pointers = [x.data_ptr() for x in (*tensors, found_lse, next_tile)]
            launch(Params(*pointers, *map(Strides.of, tensors), *sizes, case.d**-0.5, case.causal))
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

# One loop that asks in every step whether there is something to mask.
_MASK_ASKED = (
    ("if constexpr (decltype(masked)::value) mask(", "if (i >= unmasked) mask("),
    ("    for (; i >= unmasked; --i) both(i, std::true_type());\n", ""),
)
# The last claim of all leaves the counter as it was found: no memset before the kernel, one counter for each stream.
_SELF_RESET = (
    (
        "    shared.q_ring.acquire(q_step);\n",
        "    if (index == w.tiles - 1 + int(gridDim.x)) *w.next_tile = 0;\n    shared.q_ring.acquire(q_step);\n",
    ),
    ("if (const cudaError_t error = cudaMemsetAsync(p.next_tile, 0, sizeof *p.next_tile, stream)) return error;", ";"),
)
# o is scaled only where a maximum of the warp has grown.
_RESCALE_ASKED = (
    (
        "#pragma unroll\n      for (int j = 0; j < Sizes::DIM / 2; ++j) o[j] *= rescale[j / 2 % 2];\n",
        "      if (__any_sync(0xffffffff, rescale[0] != 1 || rescale[1] != 1))\n"
        "#pragma unroll\n        for (int j = 0; j < Sizes::DIM / 2; ++j) o[j] *= rescale[j / 2 % 2];\n",
    ),
)
_V_BEFORE_NEXT_K = (
    ("      if (i > 0) load_k(i - 1);\n      load_v(i);\n", "      load_v(i);\n      if (i > 0) load_k(i - 1);\n"),
)
# The exponentials run beside the warpgroup's own products. ptxas would move the wait up again, over all arithmetic, but
# not over an instruction with an effect; this one never has any.
_WAIT_LAST = (
    (
        "      wgmma_wait<0>();\n      pin(o);\n      pin(p);\n",
        "      softmax.exponentials(s);\n"
        '      asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p nanosleep.u32 0;}"\n'
        '                   ::"f"(softmax.sum[0] + softmax.sum[1]) : "memory");\n'
        "      wgmma_wait<0>();\n      pin(o);\n      pin(p);\n",
    ),
    ("      v_step.next();\n      softmax.exponentials(s);\n", "      v_step.next();\n"),
)
# The exponentials of one query, then those of the other.
_BY_ROW = (
    (
        "    for (int i = 0; i < COUNT; ++i) sum[i / 2 % 2] += s[i] = exp2_fast(s[i] * scale - shift[i / 2 % 2]);\n",
        "    for (int r = 0; r < 2; ++r)\n"
        "#pragma unroll\n"
        "      for (int i = 2 * r; i < COUNT; i += 4) {\n"
        "        sum[r] += s[i] = exp2_fast(s[i] * scale - shift[r]);\n"
        "        sum[r] += s[i + 1] = exp2_fast(s[i + 1] * scale - shift[r]);\n"
        "      }\n",
    ),
)
_NO_TURNS = tuple(
    (f"{indent}ConsumerTurns::{what}(warpgroup);\n", "")
    for indent, what in (("  ", "start"), ("      ", "wait"), ("      ", "pass"))
)
# The tile of out is that of q, which saves 32 KB: the next q waits until out has been stored.
_OUT_IN_Q = (
    ("  alignas(1024) T out[Sizes::QUERIES * Sizes::DIM];\n", ""),
    ("shared_address(shared.out)", "shared_address(shared.q)"),
    ("shared.out + column", "shared.q + column"),
    ("    if (speaks) shared.q_ring.release(q_step);\n    q_step.next();\n", ""),
    ("    if (speaks) tma_wait_read<0>();\n    barrier_sync", "    barrier_sync"),
    (
        "      tma_commit();\n",
        "      tma_commit();\n      tma_wait_read<0>();\n      shared.q_ring.release(q_step);\n",
    ),
    (
        "    if (FORWARD_SCHEDULE == DYNAMIC) {\n      shared.tile_ring.wait",
        "    q_step.next();\n    if (FORWARD_SCHEDULE == DYNAMIC) {\n      shared.tile_ring.wait",
    ),
)
_KEYS_176 = (("KEYS = 128;", "KEYS = 176;"), *_OUT_IN_Q)
_STAGES_3 = (("STAGES = 2;", "STAGES = 3;"), *_OUT_IN_Q)
# The stage that a consumer does not give back is waited for by the producer, for ever.
_DEADLOCK = ("      if (speaks) shared.v_ring.release(v_step);\n", "")

STUDY = Study(
    title="Attention, forward, d128",
    source="attention/forward.cu",
    function="attention_forward",
    params=Params,
    variants={
        "dynamic": Variant(),
        "static": Variant({"FORWARD_SCHEDULE": "STATIC"}),
        "one_tile": Variant({"FORWARD_SCHEDULE": "ONE_TILE"}),
        "self_reset": Variant(edits=_SELF_RESET),
        "no_turns": Variant(edits=_NO_TURNS),
        "no_overlap": Variant(edits=[("wgmma_wait<1>();", "wgmma_wait<0>();")]),
        "wait_last": Variant(edits=_WAIT_LAST),
        "mask_asked": Variant(edits=_MASK_ASKED),
        "rescale_asked": Variant(edits=_RESCALE_ASKED),
        "by_row": Variant(edits=_BY_ROW),
        "v_before_next_k": Variant(edits=_V_BEFORE_NEXT_K),
        "not_uniform": Variant(edits=[("__shfl_sync(0xffffffff, threadIdx.x / 128, 0)", "threadIdx.x / 128")]),
        "cached_16": Variant(edits=[("CACHED = 32 <<", "CACHED = 16 <<")]),
        "full_cached_32": Variant(edits=[("w.rows_together = p.causal ? ", "w.rows_together = true ? ")]),
        "out_in_q": Variant(edits=_OUT_IN_Q),
        "stages_3": Variant(edits=_STAGES_3),
        "keys_176": Variant(edits=_KEYS_176),
        "keys_176_no_turns": Variant(edits=(*_KEYS_176, *_NO_TURNS)),
        "deadlock": Variant(edits=[_DEADLOCK]),
    },
    checks=CHECKS,
    cases=CASES,
    prepare=_prepare,
)
