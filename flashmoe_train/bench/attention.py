"""The benches `attention_forward`, `attention_backward` and `attention_forward_backward`: ours, PyTorch's cuDNN and
flash backends, and peers."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe_train.bench import peers
from flashmoe_train.bench.attention_cases import BLOCKS, POINTS, STANDARD, TINY, Case, Documents, Forward
from flashmoe_train.bench.measure import (
    DTYPES,
    ERROR_BOUND,
    Contender,
    OperatorBench,
    Problem,
    Unavailable,
    path,
    relative_error,
    worst,
)
from flashmoe_train.ops.attention import AttentionCase, attention, supports
from flashmoe_train.ops.attention.reference import reference_backward, reference_forward

Direction = Literal["forward", "backward", "forward_backward"]

# -------------------------------------------------------------------------------------------------------- contenders
# Each takes a case and returns its forward function; a peer's is in `peers`.


def _flashmoe(case: Case, documents: Documents | None, deterministic: bool = False) -> Forward:
    cu_seqlens = documents.cu_seqlens if documents else None
    return partial(attention, causal=case.causal, cu_seqlens_q=cu_seqlens, deterministic=deterministic)


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
# Forward's sums have a fixed order anyway.
FORWARDS_OF_BACKWARD = {"flashmoe_deterministic": partial(_flashmoe, deterministic=True)}


# ----------------------------------------------------------------------------------------------------------- problems


def _prepare(case: Case, device: torch.device, direction: Direction) -> Problem:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(case.b, case.s, heads, dim, device=device, dtype=torch.float32).to(dtype)

    q, k, v, dout = (normal(*sizes) for sizes in _sizes(case))
    documents = None
    if case.documents:
        bounds = list(accumulate(case.lengths, initial=0))
        documents = Documents(torch.tensor(bounds, dtype=torch.int32, device=device), max(case.lengths))
    wanted = _reference(case, q, k, v, dout, documents, direction)

    def contender(make: Callable[[Case, Documents | None], Forward]) -> Callable[[], tuple[Tensor, ...]]:
        forward = make(case, documents)
        if direction == "forward":
            return lambda: (forward(q, k, v),)
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))

        def both() -> tuple[Tensor, ...]:
            out = forward(*inputs)
            return out.detach(), *torch.autograd.grad(out, inputs, dout)

        if direction == "forward_backward":
            return both
        out = forward(*inputs)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    forwards = FORWARDS if direction == "forward" else FORWARDS | FORWARDS_OF_BACKWARD
    contenders: dict[str, Contender] = {name: partial(contender, make) for name, make in forwards.items()}
    return Problem(
        contenders=contenders,
        error=lambda found: worst(relative_error(x, y) for x, y in zip(found, wanted, strict=True)),
        error_bound=ERROR_BOUND[dtype],
        work=sum(case.flops(one == "backward") for one in direction.split("_")),
        flashmoe_path=path(supports(AttentionCase.of(q, v, case.d**-0.5)), q.device.type),
        floors={},
    )


def _sizes(case: Case) -> tuple[tuple[int, int], ...]:
    """(heads, dim) of q, k, v and dout."""
    return (case.h, case.d), (case.h_kv, case.d), (case.h_kv, case.dv), (case.h, case.dv)


def _reference(
    case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, documents: Documents | None, direction: Direction
) -> tuple[Tensor, ...]:
    """In float64: (out), (dq, dk, dv) or all of them."""
    cu_seqlens = documents.cu_seqlens if documents else None
    mask = (case.d**-0.5, -1, 0 if case.causal else -1, cu_seqlens, cu_seqlens, True)
    q, k, v = (x.double() for x in (q, k, v))
    out, lse = reference_forward(q, k, v, *mask)
    if direction == "forward":
        return (out,)
    gradients = reference_backward(dout.double(), q, k, v, out, lse, *mask)
    return gradients if direction == "backward" else (out, *gradients)


def _bench(direction: Direction, standard: list[Case], points: list[Case]) -> OperatorBench:
    return OperatorBench(
        name=f"attention_{direction}",
        title=f"Attention, {direction.replace('_', ' + ')}",
        rate="tflops",
        standard=standard,
        tiny=TINY,
        prepare=partial(_prepare, direction=direction),
        is_point=points.__contains__,
    )


BENCHES = (
    _bench("forward", STANDARD, POINTS),
    _bench("backward", STANDARD, POINTS),
    _bench("forward_backward", BLOCKS, BLOCKS),
)
