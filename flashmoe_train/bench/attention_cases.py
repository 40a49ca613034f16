"""The cases of the attention benches, and what an implementation of attention is there."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
        words = ["causal" if self.causal else "full", dims, f"s{_short(self.s)}", f"b{self.b}", heads]
        if self.documents is not None:
            shortest, longest = self.documents
            words += ["varlen"] + [f"of {_short(longest)}"] * (shortest == longest)
        return " ".join(words + [self.dtype] * (self.dtype != "bf16"))

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


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


POINTS = [
    Case(b=16 // k, s=1024 * k, h=2048 // d, d=d, causal=causal)
    for d in (64, 128)
    for causal in (False, True)
    for k in (1, 2, 4, 8, 16)
]
STANDARD = [
    *POINTS,
    Case(b=2, s=8192, h=16, h_kv=2, d=128, causal=True),
    Case(b=2, s=8192, h=16, h_kv=4, d=128, causal=True),
    Case(b=1, s=32768, h=32, h_kv=8, d=128, causal=True),
    Case(b=16, s=1024, h=32, h_kv=4, d=128, causal=True),
    Case(b=4, s=4096, h=16, d=192, dv=128, causal=True),  # DeepSeek's latent attention
    Case(b=2, s=8192, h=21, d=96, causal=True),
    Case(b=2, s=8192, h=8, d=256, causal=True),
    Case(b=1, s=16384, h=16, d=128, causal=True, documents=(64, 4096)),
    Case(b=1, s=16384, h=16, d=128, causal=True, documents=(2048, 2048)),  # the work of the point s2k b8 h16
    *(Case(b=4, s=1024 * k, h=8, d=64, causal=False) for k in (2, 4, 8)),
    Case(b=4, s=2048, h=8, d=64, causal=True),
    Case(b=1, s=512, h=8, d=64, causal=False, dtype="fp16"),
]
BLOCKS = [  # of Llama 3 8B and 70B
    Case(b=1, s=8192, h=32, h_kv=8, d=128, causal=True),
    Case(b=1, s=8192, h=64, h_kv=8, d=128, causal=True),
]
TINY = [
    Case(b=2, s=64, h=4, d=32, causal=False, dtype="fp32"),
    Case(b=1, s=97, h=4, h_kv=2, d=16, causal=True),
    Case(b=1, s=65, h=2, d=24, dv=16, causal=True, dtype="fp32"),
    Case(b=1, s=128, h=2, d=16, causal=True, documents=(3, 40)),
]


@dataclass(frozen=True)
class Documents:
    cu_seqlens: Tensor
    longest: int
