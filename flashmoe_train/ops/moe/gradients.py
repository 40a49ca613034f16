"""Gradients of the experts' weights that are added to given tensors, at once or later, instead of going to autograd.

For frameworks that sum gradients of several microbatches in float32 (Megatron-core's `main_grad`): the matrix products'
float32 sums are added as they are, where autograd would round each microbatch's to the parameter's dtype. And for
schedules that compute gradients of weights when there is nothing better to do (delayed weight gradients; zero-bubble
pipelines: Qi et al., 2023, arXiv:2401.10241): what others wait for goes first.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmoe_train.ops.moe.experts import (
    experts_backward,
    for_frozen_weights,
    moe_forward,
    moe_weight_gradient_down_,
    moe_weight_gradient_up_,
    saved_tensors,
)


class WeightGradients:
    """Where the gradients of w1, w2 and w3 go: an argument of `moe` and `moe_rows`, whose backward then adds to these
    tensors and gives autograd none for the weights.

    Args:
        dw1, dw2, dw3: of the shapes of w1 `[E, n, d]`, w2 `[E, d, n]` and w3 `[E, n, d]`; float32 or the weights'
            dtype, one for all three; rows contiguous, and on a GPU beginning at multiples of 16 bytes.
        delayed: backward adds nothing, and keeps what `add` needs.

    With float32 tensors and our kernels nothing is rounded on the way. Order is that of the backward passes, so sums
    repeat bitwise. Not for `torch.compile`, which leaves calls with this argument to eager mode.
    """

    def __init__(self, dw1: Tensor, dw2: Tensor, dw3: Tensor, *, delayed: bool = False) -> None:
        self.sums = dw1, dw2, dw3
        self.delayed = delayed
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        """Backward passes whose gradients are still to be added."""
        return len(self._waiting)

    def add(self) -> None:
        """Adds the gradients of the oldest backward pass that waits. Raises RuntimeError if none does."""
        if not self._waiting:
            raise RuntimeError("no backward pass waits for its gradients of weights to be added")
        self._waiting.popleft()()

    def take(self, add: Callable[[], None]) -> None:
        """From a backward pass: runs `add`, now or later."""
        if self.delayed:
            self._waiting.append(add)
        else:
            add()


@torch.compiler.disable(reason="gradients of weights are added to tensors that the compiler does not see")
def added(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Applies a function that has `WeightGradients` among its inputs."""
    return function.apply(*inputs)


class Experts(torch.autograd.Function):
    """`moe_forward` whose gradients of weights go where `gradients` says."""

    @staticmethod
    def forward(ctx: Any, gradients: WeightGradients, *inputs: Any) -> Tensor:
        *tensors, ctx.score_mode = inputs
        out, h = moe_forward(*inputs)
        ctx.gradients = gradients
        ctx.save_for_backward(*tensors, h)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients: WeightGradients = ctx.gradients
        dw1, dw2, dw3 = gradients.sums
        later: list[Callable[[], None]] = []

        def adding(operator: Callable[..., None], *sums: Tensor) -> Callable[..., None]:
            def add(*given: Tensor | None) -> None:
                work = functools.partial(operator, *sums, *given, True)
                if gradients.delayed:
                    later.append(work)
                else:
                    work()

            return add

        needs_w1, needs_w2, needs_w3 = ctx.needs_input_grad[2:5]
        dx, dweights, *_ = experts_backward(
            grads[0],
            saved_tensors(ctx),
            ctx.score_mode,
            adding(moe_weight_gradient_down_, dw2) if needs_w2 else for_frozen_weights,
            adding(moe_weight_gradient_up_, dw1, dw3) if needs_w1 or needs_w3 else for_frozen_weights,
            keep_rows=needs_w2 and not gradients.delayed,
        )

        def add_all() -> None:
            while later:
                later.pop(0)()

        gradients.take(add_all)
        return None, dx, None, None, None, dweights, None, None, None, None


class Weights(torch.autograd.Function):
    """w1, w2 and w3, whose gradients, however they come about, go where `gradients` says."""

    @staticmethod
    def forward(ctx: Any, gradients: WeightGradients, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *found: Tensor) -> tuple[None, ...]:
        def add() -> None:
            for dw, gradient in zip(ctx.gradients.sums, found, strict=True):
                dw.add_(gradient)

        ctx.gradients.take(add)
        return (None,) * 4
