"""The benches `attention_forward` and `attention_backward`: ours, PyTorch's cuDNN and flash backends, and peers."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe_train.bench import peers
from flashmoe_train.bench.measure import (
    DTYPES,
    ERROR_BOUND,
    Contender,
    OperatorBench,
    Problem,
    Unavailable,
    relative_error,
    worst,
)
from flashmoe_train.ops.attention import AttentionCase, attention, supports
from flashmoe_train.ops.attention.reference import reference_backward, reference_forward

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v and the result are [b, s, h, d]


@dataclass(frozen=True)
class Case:
    b: int
    s: int
    h: int
    d: int
    causal: bool
    h_kv: int = 0  # 0: as many as h
    dv: int = 0  # 0: d
    dtype: str = "bf16"
    documents: tuple[int, int] | None = None  # packed documents of random length between these two, s tokens in all

    def __post_init__(self) -> None:
        object.__setattr__(self, "h_kv", self.h_kv or self.h)
        object.__setattr__(self, "dv", self.dv or self.d)

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("b", "s", "h", "h_kv", "d", "dv", "causal", "dtype")}
        return fields | ({"documents": list(self.documents)} if self.documents else {})

    @property
    def label(self) -> str:
        dims = f"d{self.d}" if self.dv == self.d else f"d{self.d}/{self.dv}"
        heads = f"h{self.h}" if self.h_kv == self.h else f"h{self.h}:{self.h_kv}"
        length = f"s{self.s // 1024}k" if self.s % 1024 == 0 else f"s{self.s}"
        words = ["causal" if self.causal else "full", dims, length, f"b{self.b}", heads]
        words += ["varlen"] * (self.documents is not None) + [self.dtype] * (self.dtype != "bf16")
        return " ".join(words)

    @property
    def lengths(self) -> list[int]:
        """Of the sequences of one batch entry."""
        if self.documents is None:
            return [self.s]
        pick, lengths = random.Random(0), list[int]()
        while (left := self.s - sum(lengths)) > 0:
            lengths.append(min(left, pick.randint(*self.documents)))
        return lengths

    def flops(self, backward: bool) -> float:
        pairs = self.b * self.h * sum(length * length for length in self.lengths) / (2 if self.causal else 1)
        # q kᵀ and p v; backward q kᵀ, ds k and dsᵀ q, and do vᵀ and pᵀ do
        return 2 * pairs * ((3 * self.d + 2 * self.dv) if backward else (self.d + self.dv))


_POINTS = [
    Case(b=16 // k, s=1024 * k, h=2048 // d, d=d, causal=causal)
    for d in (64, 128)
    for causal in (False, True)
    for k in (1, 2, 4, 8, 16)
]
_STANDARD = [
    *_POINTS,
    Case(b=2, s=8192, h=16, h_kv=2, d=128, causal=True),
    Case(b=2, s=8192, h=16, h_kv=4, d=128, causal=True),
    Case(b=4, s=4096, h=16, d=192, dv=128, causal=True),  # DeepSeek's latent attention
    Case(b=1, s=16384, h=16, d=128, causal=True, documents=(64, 4096)),
    *(Case(b=4, s=1024 * k, h=8, d=64, causal=False) for k in (2, 4, 8)),
    Case(b=1, s=512, h=8, d=64, causal=False, dtype="fp16"),
]
_TINY = [
    Case(b=2, s=64, h=4, d=32, causal=False, dtype="fp32"),
    Case(b=1, s=97, h=4, h_kv=2, d=16, causal=True),
    Case(b=1, s=65, h=2, d=24, dv=16, causal=True, dtype="fp32"),
    Case(b=1, s=128, h=2, d=16, causal=True, documents=(3, 40)),
]


@dataclass(frozen=True)
class Documents:
    cu_seqlens: Tensor
    longest: int


# -------------------------------------------------------------------------------------------------------- contenders
# Each takes a case and returns its forward function; a peer's is in `peers`.


def _flashmoe(case: Case, documents: Documents | None) -> Forward:
    return partial(attention, causal=case.causal, cu_seqlens_q=documents.cu_seqlens if documents else None)


def _sdpa(backend: SDPBackend, case: Case, documents: Documents | None) -> Forward:
    if documents:
        raise Unavailable("no packed documents")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.h != case.h_kv)
        return out.transpose(1, 2)

    return forward


def _varlen_flash(case: Case, documents: Documents | None) -> Forward:
    from torch.nn.attention.varlen import varlen_attn

    if documents is None:
        raise Unavailable("packed documents only")
    if case.h != case.h_kv or case.d != case.dv:
        raise Unavailable("equal heads and dims only")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu_seqlens, longest = documents.cu_seqlens, documents.longest
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        window = (-1, 0 if case.causal else -1)
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)
        assert isinstance(out, Tensor)
        return out.unsqueeze(0)

    return forward


FORWARDS: dict[str, Callable[[Case, Documents | None], Forward]] = {
    "flashmoe": _flashmoe,
    "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "varlen_flash": _varlen_flash,
    "fa3": peers.fa3_attention,
    "fa4": peers.fa4_attention,
    "te": peers.te_attention,
}


# ----------------------------------------------------------------------------------------------------------- problems


def _prepare(case: Case, device: torch.device, backward: bool) -> Problem:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(case.b, case.s, heads, dim, device=device, dtype=torch.float32).to(dtype)

    q, k, v, dout = (normal(*sizes) for sizes in _sizes(case))
    documents = None
    if case.documents:
        bounds = list(accumulate(case.lengths, initial=0))
        documents = Documents(torch.tensor(bounds, dtype=torch.int32, device=device), max(case.lengths))
    wanted = _reference(case, q, k, v, dout if backward else None, documents)

    def contender(make: Callable[[Case, Documents | None], Forward]) -> Callable[[], tuple[Tensor, ...]]:
        forward = make(case, documents)
        if not backward:
            return lambda: (forward(q, k, v),)
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out = forward(*inputs)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    contenders: dict[str, Contender] = {name: partial(contender, make) for name, make in FORWARDS.items()}
    return Problem(
        contenders=contenders,
        error=lambda found: worst(relative_error(x, y) for x, y in zip(found, wanted, strict=True)),
        error_bound=ERROR_BOUND[dtype],
        work=case.flops(backward),
        flashmoe_path=_path(q, v),
        floors={},
    )


def _sizes(case: Case) -> tuple[tuple[int, int], ...]:
    """(heads, dim) of q, k, v and dout."""
    return (case.h, case.d), (case.h_kv, case.d), (case.h_kv, case.dv), (case.h, case.dv)


def _path(q: Tensor, v: Tensor) -> str:
    if supports(AttentionCase.of(q, v)) is not None:
        return "fallback"
    return "kernel" if q.is_cuda else "reference"


def _reference(
    case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, documents: Documents | None
) -> tuple[Tensor, ...]:
    """In float64: (out) or (dq, dk, dv)."""
    cu_seqlens = documents.cu_seqlens if documents else None
    mask = (case.d**-0.5, -1, 0 if case.causal else -1, cu_seqlens, cu_seqlens, True)
    q, k, v = (x.double() for x in (q, k, v))
    out, lse = reference_forward(q, k, v, *mask)
    return (out,) if dout is None else reference_backward(dout.double(), q, k, v, out, lse, *mask)


BENCHES = tuple(
    OperatorBench(
        name=f"attention_{direction}",
        title=f"Attention, {direction}",
        rate="tflops",
        standard=_STANDARD,
        tiny=_TINY,
        prepare=partial(_prepare, backward=direction == "backward"),
        is_point=_POINTS.__contains__,
    )
    for direction in ("forward", "backward")
)
