"""The CUDA kernels of `router_topk` and its gradient against the reference, in float64 where numbers are compared."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmoe_train.ops.moe import Routing, router_topk
from flashmoe_train.ops.moe.router import SCORE_FUNCTIONS, _backward, _forward

from .operators import captured, chooser

ops = torch.ops.flashmoe
pytestmark = pytest.mark.gpu

# Relative error, in the Frobenius norm, of a gradient in the dtype of the logits: mostly its own rounding.
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def error(found: Tensor, wanted: Tensor) -> float:
    """In the Frobenius norm, relative; gradients that cancel are measured against 1e-3."""
    found, wanted = found.double(), wanted.double()
    assert found.shape == wanted.shape and torch.equal(found.isnan(), wanted.isnan())
    difference = (found - wanted).nan_to_num().norm().item()
    return difference / max(wanted.nan_to_num().norm().item(), 1e-3 * wanted.numel() ** 0.5, 1e-30)


def assert_routes(logits: Tensor, arguments: tuple[Any, ...], near_ties: bool) -> Tensor:
    """`arguments` are the operator's, after logits. Returns the ids. With `near_ties`, one token in 50 may choose
    otherwise: scores of float32 that differ by a rounding."""
    found = Routing(*ops.router_topk(logits, *arguments))
    narrow = Routing(*_forward(logits, *arguments))
    wide = Routing(*_forward(logits.double(), *arguments))
    ids = found.ids.sort(1).values
    experts, tokens = logits.shape[1], len(logits)
    assert found.ids.dtype == found.counts.dtype == torch.int32
    assert ids.numel() == 0 or (ids.min() >= 0 and ids.max() < experts and (ids.diff(dim=1) > 0).all())
    same = (found.ids == narrow.ids).all(1)
    assert (~same).sum() <= (max(1, tokens // 50) if near_ties else 0)
    if same.all():
        assert torch.equal(found.counts, narrow.counts)
    bound = 1e-12 if logits.dtype == torch.float64 else 2e-6
    usual = same & (wide.ids == narrow.ids).all(1)
    assert error(found.weights[usual], wide.weights[usual]) <= bound
    assert error(found.weights[same], narrow.weights[same].double()) <= 4 * bound
    assert error(found.score_sums, wide.score_sums) <= bound
    assert found.counts.sum() == found.ids.numel()
    return found.ids


def assert_gradient(logits: Tensor, ids: Tensor, with_sums: bool, values: tuple[str, bool, float, int]) -> None:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    dweights = torch.randn(ids.shape, dtype=wide, device="cuda")
    dsums = torch.randn(values[-1], logits.shape[1], dtype=wide, device="cuda") if with_sums else None
    found = ops.router_topk_backward(dweights, dsums, logits, ids, *values)
    wanted = _backward(dweights.double(), dsums if dsums is None else dsums.double(), logits.double(), ids, *values)
    narrow = _backward(dweights, dsums, logits, ids, *values)
    assert found.dtype == logits.dtype and found.is_contiguous()
    finite = logits.isfinite().all(1)
    allowed = max(GRADIENT_ERROR[logits.dtype], 2 * error(narrow[finite], wanted[finite]))
    assert error(found[finite], wanted[finite]) <= allowed


def draw_logits(choose: Any, mode: str, tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    shape = (tokens, experts)
    logits = torch.randn(shape, device="cuda", dtype=torch.float64)
    if mode == "apart":
        logits = torch.rand(shape, device="cuda").argsort(1).double() / experts * 6
    elif mode == "ties":
        logits = torch.randint(-2, 3, shape, device="cuda").double()
    elif mode == "saturated":  # scores of exactly 0 and 1
        logits = torch.randint(-1, 2, shape, device="cuda") * 300.0
    elif mode == "bad" and tokens > 0:
        for value in (math.nan, math.inf, -math.inf):
            logits[choose(*range(tokens)), choose(*range(experts))] = value
        logits[choose(*range(tokens))] = choose(math.nan, math.inf, -math.inf, 300.0, -300.0)
    logits = logits.to(dtype)
    if mode == "strided":
        behind = torch.full((tokens, choose(1, 3, 8)), math.nan, device="cuda", dtype=dtype)
        logits = torch.cat([logits, behind], 1)[:, :experts]
    return logits


def test_random_cases() -> None:
    choose = chooser(0)
    for _ in range(600):
        experts = choose(1, 2, 7, 16, 32, 33, 60, 64, 96, 128, 160, 256, 257, 384, 512, 513, 1024, 4096)
        groups = choose(*(g for g in (1, 1, 2, 3, 4, 5, 8, 16) if g == 1 or (experts % g == 0 and experts >= 2 * g)))
        limited = choose(*range(1, groups + 1))
        most = experts // groups * limited
        top_k = min(most, choose(1, 2, 3, 6, 8, 16, 32, 33, 60))
        sequences = choose(1, 1, 2, 5)
        tokens = sequences * choose(0, 1, 3, 13, 70, 301, 301 if experts > 256 else 12_345)  # then many for each warp
        mode = choose("plain", "apart", "ties", "saturated", "bad", "strided")
        dtype = choose(torch.bfloat16, torch.float16, torch.float32, torch.float64)
        logits = draw_logits(choose, mode, tokens, experts, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = choose(None, None, torch.randn(experts, device="cuda", dtype=wide))
        values = (choose(*SCORE_FUNCTIONS), choose(True, False), choose(1.0, 2.5))
        arguments = (bias, top_k, *values, groups, limited, sequences)
        near_ties = mode in ("plain", "strided", "bad") or bias is not None
        ids = assert_routes(logits, arguments, near_ties)
        if choose(True, False):
            ids = torch.randint_like(ids, experts)  # with duplicates
        assert_gradient(logits, ids, choose(True, False), (*values, sequences))


@pytest.mark.parametrize("experts, top_k", [(5, 5), (64, 32), (128, 128), (512, 512), (2048, 40), (8192, 2)])
@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_many_choices(experts: int, top_k: int, function: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        logits = torch.randint(-40, 40, (9, experts), device="cuda").to(dtype) / 8
        ids = assert_routes(logits, (None, top_k, function, True, 1.5, 1, 1, 3), near_ties=False)
        assert_gradient(logits, ids, True, (function, True, 1.5, 3))


@pytest.mark.parametrize("experts, groups, limited", [(64, 8, 4), (128, 4, 2), (256, 8, 4), (160, 8, 3)])
def test_many_tokens(experts: int, groups: int, limited: int) -> None:
    bias = 0.1 * torch.randn(experts, device="cuda")
    for function in SCORE_FUNCTIONS:
        for arguments in (
            (None, 8, function, False, 1.0, 1, 1, 1),
            (bias, 8, function, True, 2.5, groups, limited, 4),
        ):
            logits = torch.randn(32768, experts, device="cuda").bfloat16()
            ids = assert_routes(logits, arguments, near_ties=True)
            assert_gradient(logits, ids, True, (*arguments[2:5], arguments[-1]))


@pytest.mark.parametrize("experts", [64, 256, 512, 600])
@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_bad_logits_stay_with_their_token(function: str, experts: int) -> None:
    logits = torch.randn(40, experts, device="cuda")
    dweights = torch.randn(40, 8, device="cuda")
    arguments, values = (None, 8, function, True, 1.0, 1, 1, 1), (function, True, 1.0, 1)
    clean = Routing(*ops.router_topk(logits, *arguments))
    gradient = ops.router_topk_backward(dweights, None, logits, clean.ids, *values)
    others = torch.arange(40, device="cuda") != 3
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        for where in (slice(None), slice(5, 6), slice(0, None, 2)):
            logits_ = logits.clone()
            logits_[3, where] = bad
            found = Routing(*ops.router_topk(logits_, *arguments))
            assert torch.equal(found.ids[others], clean.ids[others])
            assert torch.equal(found.weights[others], clean.weights[others])
            own = found.ids[3].tolist()
            assert len(set(own)) == 8 and min(own) >= 0 and max(own) < experts
            again = ops.router_topk_backward(dweights, None, logits_, found.ids, *values)
            assert torch.equal(again[others], gradient[others])
    logits[3] = math.nan
    assert router_topk(logits, 4).ids[3].tolist() == [0, 1, 2, 3]


def test_negative_infinity_in_the_bias_closes_an_expert() -> None:
    bias = torch.zeros(128, device="cuda")
    bias[::2] = -math.inf
    routing = router_topk(torch.randn(300, 128, device="cuda"), 32, bias=bias)
    assert (routing.ids % 2 == 1).all()
    first = router_topk(torch.randn(300, 128, device="cuda"), 66, bias=bias).ids[:, 64:]
    assert torch.equal(first, torch.tensor([0, 2], device="cuda", dtype=torch.int32).expand(300, 2))


def test_repeats_bitwise_without_sync() -> None:
    for experts in (128, 1024):
        logits = torch.randn(8192, experts, device="cuda").bfloat16()
        dweights, dsums = torch.randn(8192, 8, device="cuda"), torch.randn(4, experts, device="cuda")

        def run(logits: Tensor = logits, dweights: Tensor = dweights, dsums: Tensor = dsums) -> tuple[Tensor, ...]:
            routing = ops.router_topk(logits, None, 8, "softmax", True, 1.0, 1, 1, 4)
            gradient = ops.router_topk_backward(dweights, dsums, logits, routing[1], "softmax", True, 1.0, 4)
            return *routing, gradient

        first = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = [run() for _ in range(10)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for found in again for a, b in zip(first, found, strict=True))


def test_replays_in_a_cuda_graph() -> None:
    logits = torch.zeros(4096, 128, device="cuda")
    dweights = torch.randn(4096, 8, device="cuda")

    def run() -> tuple[Tensor, ...]:
        routing = ops.router_topk(logits, None, 8, "sigmoid", True, 1.0, 4, 2, 2)
        return *routing, ops.router_topk_backward(dweights, None, logits, routing[1], "sigmoid", True, 1.0, 2)

    graph, found = captured(run)
    for _ in range(3):
        logits.copy_(torch.randn(logits.shape))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


def test_compiles() -> None:
    def function(logits: Tensor) -> Tensor:
        routing = router_topk(logits * 2, 4, renormalize=True)
        return (routing.weights * routing.ids).sum() + routing.score_sums.square().sum()

    compiled = torch.compile(function, fullgraph=True)
    for tokens in (8, 300):
        logits = torch.randn(tokens, 64, device="cuda", requires_grad=True)
        (found,), (wanted,) = (torch.autograd.grad(f(logits), logits) for f in (compiled, function))
        torch.testing.assert_close(found, wanted)


def test_wrong_argument() -> None:
    logits, ids = torch.zeros(4, 8, device="cuda"), torch.zeros(4, 2, device="cuda", dtype=torch.int32)
    weights, values = torch.zeros(4, 2, device="cuda"), ("softmax", False, 1.0, 1)
    for arguments, text in (
        ((weights[:3], None, logits, ids, *values), r"dweights must be \[4, 2\]"),
        ((weights.double(), None, logits, ids, *values), "dweights must be .*Float"),
        ((weights.cpu(), None, logits, ids, *values), "dweights must be on CUDA device 0"),
        ((weights, weights, logits, ids, *values), r"dscore_sums must be \[1, 8\]"),
        ((weights, None, logits, ids.long(), *values), "ids must be int32"),
        ((weights[:3], None, logits, ids[:3], *values), "ids must have one row per token of logits"),
        ((weights, None, logits.t(), ids, *values), "logits must have a contiguous last dimension"),
        ((weights, None, logits, ids, "relu", *values[1:]), "score_function must be one of"),
        ((weights, None, logits, ids, *values[:3], 3), "sequences must divide the 4 tokens"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.router_topk_backward(*arguments)
    with pytest.raises(RuntimeError, match="logits must be of at most 8192 experts on a GPU"):
        router_topk(torch.zeros(1, 8193, device="cuda"), 1)
    with pytest.raises(ValueError, match="bias must be on cuda:0, found cpu"):
        router_topk(logits, 1, bias=torch.zeros(8))
