"""What our operators and checks want to know of a model, whichever framework describes it; and what runs our operators
for such a model on this machine."""

from dataclasses import dataclass
from typing import Protocol

import torch

from flashmoe_train.errors import UsageError
from flashmoe_train.ops import attention, moe
from flashmoe_train.ops.library import HOPPER, capability, runs


class Choices(Protocol):
    """Which parts are swapped, "flashmoe", and which are "stock": a recipe's `[swap]`, TorchTitan's `[flashmoe]`."""

    @property
    def attention(self) -> str: ...

    @property
    def moe(self) -> str: ...


@dataclass(frozen=True)
class Experts:
    number: int
    top_k: int
    hidden_dim: int


@dataclass(frozen=True)
class Sizes:
    """Of a language model."""

    dim: int
    heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    vocabulary: int
    experts: Experts | None = None  # None: dense


def check_kernels(choices: Choices, dtype: str, sizes: Sizes, hint: str = "") -> None:
    """Nobody trains slowly by accident: raises UsageError where a Hopper GPU lacks kernels of what is swapped. `hint`
    follows the reasons."""
    if capability("cuda") != HOPPER:
        return
    reasons = (reason for _, reason in _supported(choices, dtype, sizes))
    if missing := [reason for reason in reasons if reason is not None]:
        raise UsageError(f"{'; '.join(missing)}{hint}; --allow-fallback trains on PyTorch's kernels instead")


def operators(choices: Choices, dtype: str, sizes: Sizes) -> list[tuple[str, str]]:
    """Each swapped operator, and what runs it for this model on this machine; `dtype` is that of its products."""
    return [(name, runs(why, _device())) for name, why in _supported(choices, dtype, sizes)]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _supported(choices: Choices, dtype_name: str, sizes: Sizes) -> list[tuple[str, str | None]]:
    device, dtype = _device(), getattr(torch, dtype_name)
    found = []
    if choices.attention == "flashmoe":
        head_dims = sizes.qk_head_dim, sizes.v_head_dim
        case = attention.AttentionCase(device, capability(device), dtype, *head_dims)
        found.append(("attention", attention.supports(case)))
    if choices.moe == "flashmoe" and (experts := sizes.experts) is not None:
        dims = sizes.dim, experts.hidden_dim, experts.number
        found.append(("moe", moe.supports(moe.MoECase(device, capability(device), dtype, *dims))))
    return found
