"""Routings and shapes that the mixture-of-experts benches share."""

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


def draw(tokens: int, experts: int, top_k: int, skew: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids int32 `[T, K]`, all different in a token; weights float32 `[T, K]`, which sum to 1).

    The experts' popularities go as rank ** -skew in an order drawn at random: 0 is uniform, 1 is Zipf's law.
    """
    rank = torch.randperm(experts, device=device) + 1
    # The top K of log-probabilities with Gumbel noise are K draws without replacement.
    noise = -torch.empty(tokens, experts, device=device).exponential_().log()
    ids = (noise - skew * rank.log()).topk(top_k).indices.int()
    return ids, torch.randn(tokens, top_k, device=device).softmax(1)
