"""The cases of the mixture-of-experts benches: shapes, routings, and what an implementation of a layer is there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# name: T, d, n, E, K
SHAPES = {
    "OLMoE": (32768, 2048, 1024, 64, 8),
    "Qwen3-30B": (32768, 2048, 768, 128, 8),
    "DSv3 slice": (8192, 7168, 2048, 64, 8),
    "fine 256": (16384, 2048, 512, 256, 8),
    "Mixtral": (8192, 4096, 14336, 8, 2),
    "DeepSeek-V3-16B": (32768, 2048, 1408, 64, 6),
}


class Inputs(NamedTuple):
    """Leaves; all but the ids require gradients where a backward follows."""

    x: Tensor  # [T, d]
    w1: Tensor  # [E, n, d]
    w2: Tensor  # [E, d, n]
    w3: Tensor  # [E, n, d]
    ids: Tensor  # [T, K]
    weights: Tensor  # [T, K]


@dataclass(frozen=True)
class Layer:
    """An implementation, set up for its inputs."""

    forward: Callable[[], Tensor]  # [T, d]
    leaves: tuple[Tensor, ...]  # what it takes gradients of
    gradients: Callable[..., tuple[Tensor, ...]] = lambda *gradients: gradients  # of these as of x, w1, w2, w3, weights


@dataclass(frozen=True)
class Case:
    name: str
    T: int
    d: int
    n: int
    E: int
    K: int
    skew: float = 0.0  # exponent of the experts' popularity; 1 is Zipf's law
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        return self.name + " zipf" * bool(self.skew)

    def as_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("T", "d", "n", "E", "K")}
        fields |= {"skew": self.skew} if self.skew else {}
        return fields | ({"dtype": self.dtype} if self.dtype != "bf16" else {})


STANDARD = [
    *(Case(name, *shape) for name, shape in SHAPES.items()),
    Case("Qwen3-30B T8192", 8192, *SHAPES["Qwen3-30B"][1:]),
    Case("Qwen3-30B T1024", 1024, *SHAPES["Qwen3-30B"][1:]),  # 64 rows an expert
    Case("fine 512", 16384, 2048, 256, 512, 8),
    Case("OLMoE", *SHAPES["OLMoE"], skew=1.0),
    Case("Qwen3-30B", *SHAPES["Qwen3-30B"], skew=1.0),
    Case("DeepSeek-V3", 32768, 7168, 2048, 256, 8),  # last: its weights and their gradients are 90 GB
]
TINY = [
    Case("tiny", 48, 32, 24, 8, 2),
    Case("tiny fp32", 33, 16, 40, 5, 3, dtype="fp32"),
    Case("tiny", 64, 16, 16, 16, 4, skew=1.0),
]


def draw(tokens: int, experts: int, top_k: int, skew: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids int32 `[T, K]`, all different in a token; weights float32 `[T, K]`, which sum to 1).

    The experts' popularities go as rank ** -skew in an order drawn at random: 0 is uniform, 1 is Zipf's law.
    """
    rank = torch.randperm(experts, device=device) + 1
    # The top K of log-probabilities with Gumbel noise are K draws without replacement.
    noise = -torch.empty(tokens, experts, device=device).exponential_().log()
    ids = (noise - skew * rank.log()).topk(top_k).indices.int()
    return ids, torch.randn(tokens, top_k, device=device).softmax(1)
