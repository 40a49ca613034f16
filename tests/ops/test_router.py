"""`router_topk` against plain PyTorch, with gradients by autograd: the reference on CPUs, the CUDA kernels on a GPU."""

import pytest
import torch
from torch import Tensor

from flashmoe_train.ops.moe import router_topk

from .operators import assert_opcheck

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHOICES = [
    {},
    {"renormalize": True},
    {"renormalize": True, "scale": 2.5},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "renormalize": True, "scale": 2.5, "bias": True},
    {"score_function": "sigmoid", "renormalize": True, "bias": True, "groups": 4, "limited_groups": 2},
    {"score_function": "topk_softmax"},
    {"groups": 2},
    {"sequences": 3},
]


def arguments(choice: dict, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict]:
    logits = torch.randn(12, 16, dtype=dtype, device=device, requires_grad=True)
    keywords = dict(choice)
    if keywords.get("bias"):
        keywords["bias"] = torch.randn(16, device=device)
    return logits, keywords


def plain(logits: Tensor, top_k: int, keywords: dict) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, score sums) token by token, with Python's own sort."""
    function = keywords.get("score_function", "softmax")
    bias = keywords.get("bias", torch.zeros(16, device=logits.device))
    groups, limited = keywords.get("groups", 1), keywords.get("limited_groups", 1)
    all_ids, all_weights, all_scores = [], [], []
    for row in logits:
        scores = row.sigmoid() if function == "sigmoid" else row.softmax(0)
        choice = (scores + bias).tolist()
        size = 16 // groups
        best = sorted(range(groups), key=lambda g: -sum(sorted(choice[g * size : (g + 1) * size])[-2:]))[:limited]
        candidates = [e for e in range(16) if e // size in best]
        ids = sorted(candidates, key=lambda e: (-choice[e], e))[:top_k]
        weights = row[ids].softmax(0) if function == "topk_softmax" else scores[ids]
        if keywords.get("renormalize"):
            weights = weights / weights.sum()
        all_ids.append(ids)
        all_weights.append(weights * keywords.get("scale", 1.0))
        all_scores.append(scores)
    sums = torch.stack(all_scores).view(keywords.get("sequences", 1), -1, 16).sum(1)
    return torch.tensor(all_ids, device=logits.device), torch.stack(all_weights), sums


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_equals_plain(choice: dict, device: str) -> None:
    logits, keywords = arguments(choice, device)
    routing = router_topk(logits, 3, **keywords)
    ids, weights, sums = plain(logits, 3, keywords)
    assert routing.ids.tolist() == ids.tolist()
    torch.testing.assert_close(routing.weights, weights)
    torch.testing.assert_close(routing.score_sums, sums)
    sequences = keywords.get("sequences", 1)
    wanted_counts = torch.stack([part.flatten().bincount(minlength=16) for part in ids.chunk(sequences)])
    assert routing.counts.tolist() == wanted_counts.tolist()
    dweights, dsums = torch.randn_like(weights), torch.randn_like(sums)
    (found,) = torch.autograd.grad((routing.weights, routing.score_sums), logits, (dweights, dsums))
    (wanted,) = torch.autograd.grad((weights, sums), logits, (dweights, dsums))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_id(device: str) -> None:
    assert router_topk(torch.zeros(2, 8, device=device), 3).ids.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_logits_give_float32_weights(device: str) -> None:
    logits = torch.randn(5, 8, device=device).bfloat16().requires_grad_()
    routing = router_topk(logits, 2)
    assert routing.weights.dtype == routing.score_sums.dtype == torch.float32
    routing.weights.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_opcheck(choice: dict, device: str) -> None:
    logits, keywords = arguments(choice, device, torch.float32)
    values = (
        keywords.get("score_function", "softmax"),
        keywords.get("renormalize", False),
        keywords.get("scale", 1.0),
    )
    rest = (keywords.get("groups", 1), keywords.get("limited_groups", 1), keywords.get("sequences", 1))
    assert_opcheck(torch.ops.flashmoe.router_topk.default, (logits, keywords.get("bias"), 3, *values, *rest))
    routing = router_topk(logits.detach(), 3, **keywords)
    gradients = torch.randn(12, 3, device=device), torch.randn(rest[2], 16, device=device)
    backward = (*gradients, logits.detach(), routing.ids, *values, rest[2])
    assert_opcheck(torch.ops.flashmoe.router_topk_backward.default, backward)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "logits, keywords, text",
    [
        (torch.zeros(4), {}, "logits must have 2 dimensions"),
        (torch.zeros(4, 8), {"top_k": 9}, "top_k must be between 1 and 8, found 9"),
        (torch.zeros(4, 8), {"top_k": 0}, "top_k must be between 1 and 8, found 0"),
        (torch.zeros(4, 8), {"top_k": 5, "groups": 2}, "top_k must be between 1 and 4, found 5"),
        (torch.zeros(4, 8), {"groups": 3}, "groups must divide the 8 experts"),
        (torch.zeros(4, 8), {"groups": 8}, "groups of at least 2"),
        (torch.zeros(4, 8), {"limited_groups": 2}, "limited_groups must be between 1 and groups = 1"),
        (torch.zeros(4, 8), {"sequences": 3}, "sequences must divide the 4 tokens"),
        (torch.zeros(4, 8), {"bias": torch.zeros(3)}, r"bias must be \[experts\] = \[8\], found \[3\]"),
        (torch.zeros(4, 8), {"score_function": "relu"}, "score_function must be one of"),
    ],
)
def test_wrong_argument(logits: Tensor, keywords: dict, text: str, device: str) -> None:
    keywords = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in keywords.items()}
    with pytest.raises((ValueError, RuntimeError), match=text):
        router_topk(logits.to(device), **{"top_k": 2, **keywords})
