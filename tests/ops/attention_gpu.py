"""What the tests of attention's CUDA kernel share: masks, calls that only it can answer, bounds of its errors."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe_train.bench.measure import relative_error
from flashmoe_train.ops.attention import AttentionCase, supports

from .attention_cases import CASES, Case, oracle, visible
from .operators import NORM_ERROR, assert_close_in_norm, forward_backward, inside

HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]  # q and k, v
DTYPES = [torch.bfloat16, torch.float16]

# Of single numbers of out, for values N(0, 1), of which the largest are 5: a probability is rounded, and the result.
ROUNDING = {torch.bfloat16: 4e-2, torch.float16: 5e-3}

# Every mask, in lengths that need several tiles, end within one, and are shorter than one.
MASKS = [
    Case(length_q=300),
    Case(length_q=300, causal=True),
    Case(length_q=130, length_k=517, causal=True),
    Case(length_q=517, length_k=130, causal=True),  # the first rows see nothing
    Case(length_q=517, length_k=130),
    Case(length_q=1, length_k=700, causal=True),
    Case(length_q=700, length_k=1),
    Case(length_q=700, window=(100, None)),
    Case(length_q=700, window=(None, 100)),
    Case(length_q=700, window=(130, 70)),
    Case(length_q=700, window=(256, None), causal=True),
    Case(length_q=700, window=(0, 0)),
    Case(length_q=700, window=(5000, 5000)),
    Case(length_q=517, length_k=130, window=(20, 200)),  # a window longer than all keys hides some all the same
    Case(length_q=130, length_k=517, window=(64, 3)),
    Case(batch=1, length_q=700, documents_q=(300, 0, 1, 129, 270), causal=True),
    Case(batch=1, length_q=700, documents_q=(64, 128, 192, 256)),  # 60 rows in no document
    Case(batch=1, length_q=700, documents_q=(0, 0, 700, 0)),
    Case(batch=1, length_q=700, documents_q=(300, 400), window=(70, 30)),
    Case(batch=1, length_q=400, documents_q=(100, 0, 300), length_k=700, documents_k=(300, 200, 130), causal=True),
    Case(batch=1, length_q=400, documents_q=(300, 100), length_k=200, documents_k=(10, 190), window=(50, 100)),
    Case(batch=1, length_q=40, documents_q=()),
]
# The kernel has small tiles for cases whose tiles, all of them, are at work at the same time.
TILES = pytest.mark.parametrize("tiles", ["small", "large"])
SMALL = [case for case in CASES if case.softmax_scale is None or case.softmax_scale > 0]


def everything(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


VIEWS: dict[str, Callable[[int, int, int, int, torch.dtype], Tensor]] = {
    "[b, h, s, d]": lambda b, s, h, d, t: everything((b, h, s, d), t).transpose(1, 2),
    "[s, b, h, d]": lambda b, s, h, d, t: everything((s, b, h, d), t).transpose(0, 1),
    "[s, h, b, d]": lambda b, s, h, d, t: everything((s, h, b, d), t).permute(2, 0, 1, 3),
    "of a fused projection": lambda b, s, h, d, t: inside((b, s, 3, h, d), (slice(None), slice(None), 1), t),
    "middle of longer sequences": lambda b, s, h, d, t: inside((b, s + 9, h, d), (slice(None), slice(5, 5 + s)), t),
    "every other row": lambda b, s, h, d, t: inside((b, 2 * s, h, d), (slice(None), slice(None, None, 2)), t),
    "every other head": lambda b, s, h, d, t: inside((b, s, 2 * h, d), (..., slice(1, None, 2), slice(None)), t),
    "end of a longer head dim": lambda b, s, h, d, t: inside((b, s, h, d + 8), (..., slice(8, None)), t),
    "end of a head dim, misaligned": lambda b, s, h, d, t: inside((b, s, h, d + 1), (..., slice(1, None)), t),
    "odd strides": lambda b, s, h, d, t: inside((b, s, h, d + 3), (..., slice(None, d)), t),
    "odd address": lambda b, s, h, d, t: inside((b * s * h * d + 1,), (slice(1, None),), t).view(b, s, h, d),
    "one head for all": lambda b, s, h, d, t: everything((b, s, 1, d), t).expand(b, s, h, d),
    "one row for all": lambda b, s, h, d, t: everything((b, 1, h, d), t).expand(b, s, h, d),
    "one sequence for all": lambda b, s, h, d, t: everything((1, s, h, d), t).expand(b, s, h, d),
    "one vector for all": lambda b, s, h, d, t: everything((1, 1, 1, d), t).expand(b, s, h, d),
}  # fmt: skip


def with_tiles(tiles: str, case: Case) -> Case:
    """The case as it is, or with so many times the heads that the kernel takes its large tiles."""
    if tiles == "small":
        return case
    busy = torch.cuda.get_device_properties(0).multi_processor_count + 1
    times = math.ceil(busy / max(1, case.batch * case.heads * math.ceil(case.length_q / 64)))
    return replace(case, heads=case.heads * times, groups=case.groups * times)


def kernel(
    case: Case, q: Tensor, k: Tensor, v: Tensor, mask: tuple | None = None, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernel, not of any other: where it does not take the case, this fails.

    What it leaves unwritten is NaN, if the allocator gives it the memory that was freed just before.
    """
    mask = case.mask(q) if mask is None else mask
    assert supports(AttentionCase.of(q, v, mask[0])) is None
    batch, length, heads, _ = q.shape
    shapes = [((batch, length, heads, v.shape[3]), q.dtype), ((batch, heads, length), torch.float32)]
    freed = [torch.full(shape, torch.nan, dtype=dtype, device=q.device) for shape, dtype in shapes * 2]
    del freed
    found = torch.ops.flashmoe.attention_forward(q, k, v, *mask, deterministic)
    for x, (shape, dtype) in zip(found, shapes, strict=True):
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and x.device == q.device
    return found


def kernel_gradients(
    case: Case,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: tuple | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the kernel, as `kernel` gives out and lse."""
    mask = case.mask(q) if mask is None else mask
    assert supports(AttentionCase.of(q, v, mask[0]), complete=True) is None
    freed = [torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in (q, k, v) * 2]
    del freed
    found = torch.ops.flashmoe.attention_backward(dout, q, k, v, out, lse, *mask, deterministic)
    for x, like in zip(found, (q, k, v), strict=True):
        assert x.shape == like.shape and x.dtype == like.dtype and x.is_contiguous() and x.device == q.device
    return found


def oracle_gradients(case: Case, dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in float64, not rounded to the inputs' dtype."""
    inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    return torch.autograd.grad(oracle(case, *inputs)[0], inputs, dout.double())


def out_of(case: Case, deterministic: bool = False) -> Callable[..., Tensor]:
    """out as a function of q, k and v, with gradients."""
    return lambda q, k, v: kernel(case, q, k, v, deterministic=deterministic)[0]


def perfect_flash(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) by float32 arithmetic that rounds probabilities, their gradients and the results to the inputs'
    dtype, once: the error that is left to a flash attention on tensor cores which does everything else right."""
    groups, dtype = k.shape[2], q.dtype
    q, k, v, dout = (x.detach().float() for x in (q, k, v, dout))
    scale = case.mask(q)[0]
    k, v = (x.repeat_interleave(q.shape[2] // groups, 2) for x in (k, v))
    hidden = ~visible(case, q.shape[1], k.shape[1], q.device)
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(hidden, -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    p = (scores - largest).exp()
    total = p.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    out = torch.einsum("bhij,bjhv->bihv", _rounded(p, dtype), v) / total.transpose(1, 2)
    p = p / total
    delta = (dout * _rounded(out, dtype)).sum(-1).transpose(1, 2)[..., None]
    ds = _rounded(p * (torch.einsum("bihv,bjhv->bhij", dout, v) - delta), dtype)
    dq = torch.einsum("bhij,bjhd->bihd", ds, k) * scale
    dk = torch.einsum("bhij,bihd->bjhd", ds, q) * scale
    dv = torch.einsum("bhij,bihv->bjhv", _rounded(p, dtype), dout)
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return tuple(x.to(dtype) for x in (out, dq, dk, dv))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def sdpa_flash(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's flash kernel, which knows full and square causal attention with one head dim."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True).transpose(1, 2)


def assert_within_contract(name: str, found: Tensor, wanted: Tensor, *yardsticks: Tensor) -> None:
    """Error in the Frobenius norm at most 1.15 times that of every yardstick; largest error at most twice that of the
    first, which is perfect flash."""
    for i, yardstick in enumerate(yardsticks):
        error, allowed = relative_error(found, wanted), 1.15 * relative_error(yardstick, wanted)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e} by yardstick {i}"
    error, allowed = ((x.double() - wanted).abs().max().item() for x in (found, yardsticks[0]))
    assert error <= 2 * allowed, f"{name}: largest error {error:.2e}, that of perfect flash {allowed:.2e}"


def assert_right(name: str, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """out and lse, for shapes of any size: no row, no single number may be wrong."""
    out, lse = found
    assert_close_in_norm(name, out, wanted[0].detach())
    error = (out.double() - wanted[0]).abs().max().item() if out.numel() else 0.0
    assert error <= ROUNDING[out.dtype], f"{name}: largest error of out {error:.1e}"
    assert_lse(name, lse, wanted[1])


def assert_right_gradients(
    name: str,
    case: Case,
    found: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    kept: tuple[Tensor, Tensor] | None = None,
    perfect: tuple[Tensor, ...] | None = None,
) -> None:
    """dq, dk and dv, for shapes of any size, of the queries and keys that are `kept`: no row may be wrong, and those
    without a partner are exactly zero. Few rows of large logits may be as inexact as those of `perfect` flash."""
    dq, keys = found[0], found[1].shape[1]
    seen = visible(case, dq.shape[1], keys, dq.device)
    partners = seen.any(1), seen.any(0)
    kept = tuple(torch.ones_like(x) for x in partners) if kept is None else kept
    terms = (1, 1)  # of the sums
    if seen.numel():
        terms = seen.sum(1).max().item(), seen.sum(0).max().item() * (dq.shape[2] // found[1].shape[2])
    for i, (of, x, y, side) in enumerate(zip(("dq", "dk", "dv"), found, wanted, (0, 1, 1), strict=True)):
        # Of what is zero by cancellation: there float32's errors remain, which add up where all terms are the same.
        scale = max(1.0, case.mask(dq)[0] * dq.shape[3] ** 0.5, 2e-3 * terms[side])
        assert not x[:, kept[side] & ~partners[side]].any(), f"{of} of {name}: not 0 in rows that have no gradient"
        x, y = x[:, kept[side]], y[:, kept[side]]
        allowed = 0.0 if perfect is None else 1.5 * relative_error(perfect[i][:, kept[side]], y)
        if not relative_error(x, y) <= allowed:
            assert_close_in_norm(f"{of} of {name}", x / scale, y / scale)
        size, usual = y.norm(dim=-1), y.norm() / max(1, y.numel() // y.shape[3]) ** 0.5
        allowed = 8 * NORM_ERROR[x.dtype] * size.clamp(min=max(usual.item(), 0.1 * scale * y.shape[3] ** 0.5))
        wrong = ~((x - y).norm(dim=-1) <= allowed)
        assert not wrong.any(), f"{of} of {name}: {int(wrong.sum())} wrong rows, {wrong.nonzero()[:3].tolist()}"


def assert_lse(name: str, found: Tensor, wanted: Tensor) -> None:
    empty = wanted == -torch.inf
    assert torch.equal(found == -torch.inf, empty), f"{name}: -inf in other rows than those that see nothing"
    error = (found - wanted).masked_fill(empty, 0.0).abs().max().item() if found.numel() else 0.0
    assert error < 1e-3, f"{name}: error of lse {error:.1e}"  # NaN is not


def random_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.detach() for x in case.tensors(dtype, "cuda"))


def assert_gradients(case: Case, inputs: tuple[Tensor, ...], deterministic: bool = False) -> None:
    out, _ = oracle(case, *inputs)
    dout = torch.randn_like(out).to(inputs[0].dtype)
    wanted = out.detach(), *torch.autograd.grad(out, inputs, dout.double())
    for name, x, y in zip(
        ("out", "dq", "dk", "dv"), forward_backward(out_of(case, deterministic), inputs, dout), wanted, strict=True
    ):
        assert_close_in_norm(f"{name} of {case}", x, y)


def random_case(
    pick: Callable, head_dims: list[tuple[int, int]] = HEAD_DIMS, longest: int = 1000
) -> tuple[Case, torch.dtype]:
    dim, dim_v = pick(*head_dims)
    groups = pick(1, 1, 2, 3, 4)
    lengths = (1, 7, 31, 63, 64, 65, 100, 127, 128, 129, 191, 192, 255, 257, 300, 383, 511, 640, 1000)
    lengths = [pick(*(length for length in lengths if length <= longest)) for _ in "qk"]
    case = Case(
        batch=pick(1, 2, 3),
        length_q=lengths[0],
        length_k=pick(*lengths),
        heads=groups * pick(1, 1, 2, 3, 4, 8),
        groups=groups,
        dim=dim,
        dim_v=dim_v,
        causal=pick(True, False),
        window=(pick(None, None, 0, 5, 64, 100, 200, 1000), pick(None, None, 0, 5, 64, 100, 200, 1000)),
        softmax_scale=pick(None, None, 0.02, 0.3),
        layout=pick("bshd", "bhsd", "sbhd"),
    )
    if pick(True, False, False):
        ends = [sorted(pick(*range(n + 1)) for _ in range(4)) for n in (case.length_q, case.length_k)]
        documents = [tuple(b - a for a, b in itertools.pairwise([0, *x])) for x in ends]
        case = replace(case, batch=1, documents_q=documents[0], documents_k=documents[1])
    return with_tiles(pick("small", "large"), case), pick(*DTYPES)
