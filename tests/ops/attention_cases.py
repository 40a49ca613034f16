"""Inputs and the oracle of the attention tests.

The oracle is written differently from the reference on purpose: one dense float64 softmax whose mask comes from
comparing every pair of rows, gradients by autograd.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    batch: int = 2
    length_q: int = 17
    length_k: int | None = None  # default: length_q
    heads: int = 4
    groups: int = 2
    dim: int = 8
    dim_v: int | None = None  # default: dim
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    documents_q: tuple[int, ...] | None = None  # lengths
    documents_k: tuple[int, ...] | None = None
    softmax_scale: float | None = None
    layout: str = "bshd"

    def __str__(self) -> str:
        changed = {k: v for k, v in self.__dict__.items() if v != type(self).__dataclass_fields__[k].default}
        return " ".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with gradients required, in the case's memory layout."""
        length_k = self.length_q if self.length_k is None else self.length_k
        dim_v = self.dim if self.dim_v is None else self.dim_v

        def make(length: int, heads: int, dim: int) -> Tensor:
            sizes = {"b": self.batch, "s": length, "h": heads, "d": dim}
            x = torch.randn([sizes[c] for c in self.layout], dtype=torch.float64, device=device).to(dtype)
            return x.permute([self.layout.index(c) for c in "bshd"]).detach().requires_grad_()

        return (
            make(self.length_q, self.heads, self.dim),
            make(length_k, self.groups, self.dim),
            make(length_k, self.groups, dim_v),
        )

    def arguments(self, device: str = "cpu") -> dict:
        """Keyword arguments of `flashmoe_train.attention`."""
        arguments: dict = {"causal": self.causal, "window": self.window, "softmax_scale": self.softmax_scale}
        if self.documents_q is not None:
            arguments["cu_seqlens_q"] = cumulative(self.documents_q, device)
            if self.documents_k is not None:
                arguments["cu_seqlens_k"] = cumulative(self.documents_k, device)
        return arguments

    def mask(self, q: Tensor) -> tuple:
        """Arguments of the operator between q, k, v and `deterministic`: scale, left, right, both cu_seqlens."""
        left, right = (-1 if side is None else side for side in self.window)
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        arguments = self.arguments(str(q.device))
        cu_seqlens_q = arguments.get("cu_seqlens_q")
        return scale, left, 0 if self.causal else right, cu_seqlens_q, arguments.get("cu_seqlens_k", cu_seqlens_q)


def cumulative(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def visible(case: Case, length_q: int, length_k: int, device: torch.device) -> Tensor:
    """[S, T]: whether query i sees key j, from the definition, document by document."""
    documents_q, documents_k = (length_q,), (length_k,)
    if case.documents_q is not None:
        documents_q = case.documents_q
        documents_k = documents_q if case.documents_k is None else case.documents_k
    mask = torch.zeros(length_q, length_k, dtype=torch.bool, device=device)
    begin_q = begin_k = 0
    left, right = case.window
    for n_q, n_k in zip(documents_q, documents_k, strict=True):
        i, j = torch.arange(n_q, device=device)[:, None], torch.arange(n_k, device=device)
        offset = j - (i + n_k - n_q)
        seen = torch.ones_like(offset, dtype=torch.bool)
        if left is not None:
            seen &= offset >= -left
        if right is not None:
            seen &= offset <= right
        if case.causal:
            seen &= offset <= 0
        mask[begin_q : begin_q + n_q, begin_k : begin_k + n_k] = seen
        begin_q, begin_k = begin_q + n_q, begin_k + n_k
    return mask


def oracle(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, V], lse [B, H, S]) in float64, differentiable."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if case.softmax_scale is None else case.softmax_scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    mask = visible(case, q.shape[1], k.shape[1], q.device)
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k).masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1) * mask
    return torch.einsum("bhij,bjhv->bihv", weights, v), scores.logsumexp(-1)


CASES = [
    Case(),
    Case(causal=True),
    Case(causal=True, length_q=300, heads=2, groups=1, batch=1),  # several chunks of the reference
    Case(length_q=1, causal=True),
    Case(length_q=5, length_k=23, causal=True),
    Case(length_q=23, length_k=5, causal=True),  # the first rows see nothing
    Case(length_q=7, length_k=0),
    Case(length_q=0, length_k=7),
    Case(batch=0),
    Case(window=(3, 2)),
    Case(window=(0, 0)),
    Case(window=(None, 4)),
    Case(window=(5, None), causal=True, length_q=270),
    Case(window=(4, 1), length_q=9, length_k=30),
    Case(heads=6, groups=6),
    Case(heads=6, groups=1),
    Case(heads=6, groups=2, causal=True),
    Case(dim=24, dim_v=16, causal=True),  # MLA: 192/128 in small
    Case(softmax_scale=0.7),
    Case(softmax_scale=-0.7, causal=True),
    Case(softmax_scale=0.0, causal=True),
    Case(layout="bhsd", causal=True),
    Case(layout="sbhd", causal=True),
    Case(batch=1, length_q=40, documents_q=(13, 0, 1, 26), causal=True),
    Case(batch=1, length_q=40, documents_q=(13, 0, 1, 20)),  # 6 rows in no document
    Case(batch=1, length_q=20, documents_q=(5, 0, 15), length_k=30, documents_k=(10, 8, 12), causal=True),
    Case(batch=1, length_q=40, documents_q=(20, 20), window=(3, 1)),
]
