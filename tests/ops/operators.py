"""What the operator tests of all families share."""

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from flashmoe_train.ops.attention import copies
from flashmoe_train.ops.library import HOPPER, capability

ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(capability("cuda") not in (None, HOPPER), reason="the kernels are for Hopper GPUs"),
]


def forward_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    """(out, gradients of inputs)."""
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def inside(shape: tuple[int, ...], index: tuple, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers in a part of a tensor on the GPU, and NaN around them."""
    view = torch.full(shape, torch.nan, dtype=dtype, device="cuda")[index]
    return view.copy_(torch.randn(view.shape, device="cuda"))


# Relative error, in the Frobenius norm, of a result that was rounded a few times on the way.
NORM_ERROR = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close_in_norm(name: str, found: Tensor, wanted: Tensor) -> None:
    """|found - wanted| <= bound of found's dtype · |wanted|, and nothing is NaN.

    Where the result is zero by cancellation (a softmax over one key has no gradient) the scale is a tenth of the
    N(0, 1) inputs'.
    """
    found, wanted, bound = found.double(), wanted.to(found.device).double(), NORM_ERROR[found.dtype]
    assert found.shape == wanted.shape
    error, scale = (found - wanted).norm().item(), max(wanted.norm().item(), 0.1 * wanted.numel() ** 0.5)
    assert error <= bound * scale, f"{name}: relative error {error / scale:.1e}, allowed {bound:.0e}"


def assert_opcheck(operator: torch._ops.OpOverload, arguments: tuple) -> None:
    """PyTorch's own checks of schema, autograd registration, fake and AOT dispatch, all of them."""
    results = torch.library.opcheck(operator, arguments, test_utils=list(ALL_TEST_UTILS))
    assert set(results.values()) == {"SUCCESS"}


def captured(function: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of a call, after one outside it, and the tensors that every replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def saving(*operators: torch._ops.OpOverload) -> Callable[[], tuple]:
    """`context_fn` of torch.utils.checkpoint: what `operators` return is saved, all else computed again."""

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


class CountOperators(TorchDispatchMode):
    """Counts the calls of our operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flashmoe":
            self.counts[func.name().removeprefix("flashmoe::")] += 1
        return func(*args, **(kwargs or {}))


class Copied(TorchDispatchMode):
    """Collects what the attention kernel would copy of the tensors that our operator gets: `calls`, one entry each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.flashmoe.attention_forward.default:
            self.calls.append(copies(*args[:3]))
        return func(*args, **(kwargs or {}))


def chooser(seed: int) -> Callable:
    """A function that picks one of its arguments, the same sequence of picks for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *choices: choices[int(torch.randint(len(choices), (), generator=generator))]
