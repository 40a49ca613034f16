"""The correctness contract of the gradients that attention's CUDA kernel computes, and how it is asked for them."""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashmoe_train import attention
from flashmoe_train.bench.measure import relative_error

from .attention_cases import Case, cumulative, oracle
from .attention_gpu import (
    DTYPES,
    HEAD_DIMS,
    MASKS,
    SMALL,
    TILES,
    VIEWS,
    assert_right_gradients,
    assert_within_contract,
    kernel,
    kernel_gradients,
    oracle_gradients,
    perfect_flash,
    random_case,
    random_inputs,
    sdpa_flash,
    with_tiles,
)
from .operators import NORM_ERROR, ON_HOPPER, assert_close_in_norm, chooser, forward_backward

ops = torch.ops.flashmoe
pytestmark = ON_HOPPER

EITHER = pytest.mark.parametrize("deterministic", [False, True])
GRADIENTS = ("dq", "dk", "dv")


def random_problem(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """dout, q, k and v; out and lse of the kernel."""
    q, k, v = random_inputs(case, dtype)
    dout = torch.randn(*q.shape[:3], v.shape[3], device=q.device).to(dtype)
    return dout, q, k, v, *kernel(case, q, k, v)


def assert_kernel_right(name: str, case: Case, problem: tuple[Tensor, ...]) -> None:
    """Either way of the kernel against float64."""
    wanted = oracle_gradients(case, *problem[:4])
    for deterministic in (False, True):
        found = kernel_gradients(case, *problem, deterministic=deterministic)
        assert_right_gradients(f"{name}, deterministic={deterministic}", case, found, wanted)


# ------------------------------------------------------------------------------------------------------ how exact it is

CONTRACT = [
    Case(length_q=1000),
    Case(length_q=1000, causal=True),
    Case(length_q=600, heads=8, groups=1, causal=True),
    Case(length_q=500, length_k=900, heads=6, groups=2, causal=True),
    Case(batch=1, length_q=1000, window=(200, 50)),
    Case(batch=1, length_q=1200, heads=8, documents_q=(300, 0, 1, 500, 350), causal=True),
    Case(length_q=700, causal=True, softmax_scale=1.0),
]


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize("case", CONTRACT, ids=str)
def test_contract(case: Case, dim: int, dim_v: int, dtype: torch.dtype, deterministic: bool) -> None:
    case = replace(case, dim=dim, dim_v=dim_v)
    dout, q, k, v, *rest = random_problem(case, dtype)
    found = kernel_gradients(case, dout, q, k, v, *rest, deterministic=deterministic)
    yardsticks = [perfect_flash(case, q, k, v, dout)[1:]]
    plain = replace(case, heads=4, groups=2, causal=False) == Case(length_q=case.length_q, dim=dim, dim_v=dim_v)
    if plain and dim == dim_v:
        inputs = tuple(x.requires_grad_() for x in (q, k, v))
        yardsticks.append(forward_backward(functools.partial(sdpa_flash, case), inputs, dout)[1:])
    wanted = oracle_gradients(case, dout, q, k, v)
    for name, x, y, *of_yardsticks in zip(GRADIENTS, found, wanted, *yardsticks, strict=True):
        assert_within_contract(name, x.detach(), y, *of_yardsticks)


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_ragged_lengths(dim: int, dim_v: int, dtype: torch.dtype, tiles: str) -> None:
    for length, causal in itertools.product((1, 7, 63, 64, 65, 127, 129, 1000), (False, True)):
        case = with_tiles(tiles, Case(length_q=length, dim=dim, dim_v=dim_v, causal=causal))
        assert_kernel_right(str(case), case, random_problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize("case", MASKS + SMALL, ids=str)
def test_every_mask(case: Case, dim: int, dim_v: int, dtype: torch.dtype) -> None:
    """Rows without a partner get zeros, whatever was in their memory before: `kernel_gradients` puts NaN there."""
    case = replace(case, dim=dim, dim_v=dim_v)
    assert_kernel_right("the mask", case, random_problem(case, dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "heads, groups", [(4, 4), (4, 2), (9, 3), (8, 2), (8, 1), (16, 2), (15, 3), (48, 6), (160, 40)]
)
def test_ratios_of_heads(heads: int, groups: int, causal: bool) -> None:
    for dim, dim_v in HEAD_DIMS:
        case = Case(length_q=300, heads=heads, groups=groups, dim=dim, dim_v=dim_v, causal=causal)
        assert_kernel_right(str(case), case, random_problem(case, torch.bfloat16))


@pytest.mark.parametrize("chunk", range(9))
def test_random_shapes(chunk: int) -> None:
    """With NaN in every row of no document, and in a document of its own: those reach no other."""
    pick = chooser(seed=100 + chunk)
    for _ in range(130):
        case, dtype = random_case(pick, HEAD_DIMS, longest=640)
        deterministic, view = pick(False, True), pick(None, *VIEWS)
        q, k, v = random_inputs(case, dtype)
        dout = torch.randn(*q.shape[:3], case.dim_v or case.dim, device="cuda").to(dtype)
        if view is not None:
            q, k, v, dout = (VIEWS[view](*x.shape, dtype) for x in (q, k, v, dout))
        wanted, perfect = oracle_gradients(case, dout, q, k, v), perfect_flash(case, q, k, v, dout)[1:]
        kept = None
        if case.documents_q is not None and case.documents_k is not None:
            last = len(case.documents_q)
            documents = of_document(case.documents_q, case.length_q), of_document(case.documents_k, k.shape[1])
            broken = pick(*range(last))
            q, k, v, dout = (x.clone() for x in (q, k, v, dout))  # expanded ones cannot be written
            for x, of in ((q, documents[0]), (dout, documents[0]), (k, documents[1]), (v, documents[1])):
                x[:, (of == broken) | (of == last)] = torch.nan
            kept = documents[0] != broken, documents[1] != broken
        out, lse = kernel(case, q, k, v)
        if kept is not None:
            out[:, documents[0] == last] = torch.nan
        found = kernel_gradients(case, dout, q, k, v, out, lse, deterministic=deterministic)
        name = f"{case} {dtype} deterministic={deterministic} {view}"
        assert_right_gradients(name, case, found, wanted, kept, perfect)


def of_document(lengths: tuple[int, ...], rows: int) -> Tensor:
    """[rows]: the document of each; behind the last document their number."""
    return torch.bucketize(torch.arange(rows, device="cuda"), cumulative(lengths, "cuda")[1:], right=True)


@pytest.mark.parametrize("softmax_scale", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_scales(dim: int, dim_v: int, softmax_scale: float) -> None:
    case = Case(length_q=300, dim=dim, dim_v=dim_v, causal=True, softmax_scale=softmax_scale)
    assert_kernel_right("the scale", case, random_problem(case, torch.bfloat16))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_large_logits(dim: int, dim_v: int, causal: bool) -> None:
    """Up to 1e4, of both signs: most probabilities are 0 or 1, and few rows have gradients of q and k at all. Of those
    float32 leaves 3 digits of the scores."""
    case = Case(length_q=300, dim=dim, dim_v=dim_v, causal=causal, softmax_scale=1.0)
    dout, q, k, v, *_ = random_problem(case, torch.bfloat16)
    size = (1e4 / 3 / dim**0.5) ** 0.5  # as in forward's test
    q, k = q * size, k * size
    out, lse = kernel(case, q, k, v)
    assert lse.abs().max() > 7e3
    wanted, perfect = oracle_gradients(case, dout, q, k, v), perfect_flash(case, q, k, v, dout)[1:]
    for deterministic in (False, True):
        found = kernel_gradients(case, dout, q, k, v, out, lse, deterministic=deterministic)
        for name, x, y, yardstick in zip(GRADIENTS, found, wanted, perfect, strict=True):
            assert relative_error(x, y) <= 2 * relative_error(yardstick, y) + NORM_ERROR[x.dtype], name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_equal_keys(dim: int, dim_v: int, causal: bool) -> None:
    """All probabilities of a row are the same: dq is 0 by cancellation."""
    case = Case(length_q=400, dim=dim, dim_v=dim_v, causal=causal)
    dout, q, k, v, *_ = random_problem(case, torch.bfloat16)
    k = k[:, :1].repeat(1, 400, 1, 1)
    assert_kernel_right("equal keys", case, (dout, q, k, v, *kernel(case, q, k, v)))


@EITHER
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(length_q=150, causal=True),
        Case(length_q=100, length_k=220, heads=8, groups=1, window=(70, 20)),
        Case(batch=1, length_q=200, documents_q=(90, 0, 100), causal=True),
    ],
    ids=str,
)
def test_directional_derivatives(case: Case, dim: int, dim_v: int, deterministic: bool) -> None:
    """Differences of the loss, in float64, along the gradient that the kernel found and along random directions."""
    case = replace(case, dim=dim, dim_v=dim_v)
    dout, *inputs, out, lse = random_problem(case, torch.bfloat16)
    grads = [x.double() for x in kernel_gradients(case, dout, *inputs, out, lse, deterministic=deterministic)]

    def loss(step: float, direction: list[Tensor]) -> float:
        moved = [x.double() + step * y for x, y in zip(inputs, direction, strict=True)]
        return (oracle(case, *moved)[0] * dout.double()).sum().item()

    for i in range(3):  # of q, k and v alone
        size = grads[i].norm().item()
        for along in ("gradient", "random", "random"):
            towards = grads[i] if along == "gradient" else torch.randn_like(grads[i])
            unit = towards / towards.norm()
            direction = [unit if j == i else torch.zeros_like(x) for j, x in enumerate(grads)]
            measured = (loss(1e-3, direction) - loss(-1e-3, direction)) / 2e-3
            computed = (grads[i] * unit).sum().item()
            # Of a random direction little is along the gradient and its error.
            allowed = NORM_ERROR[torch.bfloat16] * size * (1 if along == "gradient" else 2 / unit.numel() ** 0.5)
            assert abs(measured - computed) <= allowed, f"{GRADIENTS[i]} along {along}"


# -------------------------------------------------------------------------------------------------------- deterministic


@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(length_q=1500),
        Case(length_q=1500, heads=8, groups=8, causal=True),
        Case(length_q=700, heads=16, groups=2, causal=True),
        Case(batch=1, length_q=1500, length_k=3000, window=(1000, None), causal=True),
        Case(batch=1, length_q=3000, heads=8, groups=2, causal=True, documents_q=(700, 0, 1, 1200, 64, 935)),
    ],
    ids=str,
)
def test_repeats_bitwise_on_a_busy_gpu(case: Case, dim: int, dim_v: int) -> None:
    """20 times, while another stream takes multiprocessors away; and what it says is what the default says."""
    case = replace(case, dim=dim, dim_v=dim_v)
    problem = random_problem(case, torch.bfloat16)
    mask = case.mask(problem[1])
    default = kernel_gradients(case, *problem, mask)
    first = kernel_gradients(case, *problem, mask, deterministic=True)
    for name, x, y in zip(GRADIENTS, first, default, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error <= NORM_ERROR[x.dtype] / 5, f"{name}: {error:.1e} from what the default computes"
    matrix, other = torch.randn(2048, 2048, device="cuda").bfloat16(), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    same = []
    for run in range(20):
        with torch.cuda.stream(other):
            for rows in (64, 512, 2048)[: run % 4]:
                matrix[:rows] @ matrix
        found = kernel_gradients(case, *problem, mask, deterministic=True)
        same.append(torch.stack([(x == y).all() for x, y in zip(found, first, strict=True)]))
    assert torch.stack(same).all()


def test_public_function_asks_for_what_it_was_asked() -> None:
    """`attention` passes `deterministic` on, whether it is said or set for the process; and the kernel gets it."""
    case = Case(length_q=900, heads=8, groups=2, dim=128, causal=True)
    dout, *inputs, out, lse = random_problem(case, torch.bfloat16)
    mask = case.mask(out)
    inputs = tuple(x.requires_grad_() for x in inputs)
    wanted = ops.attention_backward(dout, *(x.detach() for x in inputs), out, lse, *mask, True)
    said = forward_backward(functools.partial(attention, causal=True, deterministic=True), inputs, dout)
    torch.use_deterministic_algorithms(True)
    try:
        switched = forward_backward(functools.partial(attention, causal=True), inputs, dout)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y, z in zip(wanted, said[1:], switched[1:], strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


# ------------------------------------------------------------------------------------------------ memory and neighbours

EXPANDED = [view for view in VIEWS if view.endswith("for all")]


@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize(
    "case", [Case(length_q=200, causal=True), Case(batch=1, length_q=200, documents_q=(70, 0, 90))], ids=str
)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, case: Case, dim: int, dim_v: int) -> None:
    """Of every tensor that it reads, bitwise what contiguous copies give."""
    case = replace(case, dim=dim, dim_v=dim_v)
    dout, q, k, v, _, _ = random_problem(case, torch.bfloat16)
    views = [VIEWS[view](*x.shape, x.dtype) for x in (dout, q, k, v)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    out, lse = kernel(case, *copies[1:])
    # An expanded out could not be written; it has an odd last dimension instead, as lse.
    out_view = out.mT.contiguous().mT if view in EXPANDED else VIEWS[view](*out.shape, out.dtype).copy_(out)
    found = kernel_gradients(case, *views, out_view, lse.mT.contiguous().mT, deterministic=True)
    wanted = kernel_gradients(case, *copies, out, lse, deterministic=True)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@EITHER
@pytest.mark.parametrize(
    "bounds", [[0, 10**9], [-7, 90], [0, 150, 40, 200], [90, 30], [-(2**31), 2**31 - 1], [5, 5, 5]]
)
def test_any_bounds_stay_within_the_tensors(bounds: list[int], deterministic: bool) -> None:
    """The values of cu_seqlens are read on the GPU alone: wrong ones give wrong numbers, and nothing else."""
    case = Case(batch=1, length_q=200, dim=128, causal=True, documents_q=(200,))
    q, k, v = random_inputs(replace(case, batch=3), torch.bfloat16)
    q, k, v = q[1:2], k[1:2], v[1:2]  # what lies around them belongs to somebody else
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    mask = (128**-0.5, -1, 0, cu_seqlens, cu_seqlens)
    out, lse = kernel(case, q, k, v, mask)
    kernel_gradients(case, torch.randn_like(out), q, k, v, out, lse, mask, deterministic)
    torch.cuda.synchronize()


@EITHER
def test_more_than_2_to_the_31_elements_in_a_sequence(deterministic: bool) -> None:
    """From the first to the last of them, in heads of one tensor. As in forward's test parts of the sequence stand for
    themselves, but for what their neighbours see."""
    length = 2**31 // (64 * 128) + 77
    case = Case(batch=1, length_q=length, heads=8, groups=2, dim=128, causal=True, window=(127, None))
    whole = torch.empty(1, length, 64, 128, device="cuda", dtype=torch.bfloat16)
    assert whole.numel() > 2**31
    q, dout, place, k, v = (x for x in whole[:, :, :28].split((8, 8, 8, 2, 2), 2))
    for x in (q, k, v, dout):
        x.normal_()
    out, lse = kernel(case, q, k, v)
    found = kernel_gradients(case, dout, q, k, v, place.copy_(out), lse, deterministic=deterministic)
    for end in (600, length // 2, length):
        rows = slice(end - 600, end)
        wanted = oracle_gradients(replace(case, length_q=600), *(x[:, rows] for x in (dout, q, k, v)))
        alone = slice(0 if end == 600 else 127, 600 if end == length else 600 - 127)
        for name, x, y in zip(GRADIENTS, found, wanted, strict=True):
            assert_close_in_norm(f"{name} up to {end}", x[:, rows][:, alone], y[:, alone])


def test_first_work_of_a_thread() -> None:
    """Autograd's threads may have no CUDA context yet, and the driver wants one to describe tensors."""
    case = Case(2, 128, 128, 2, 2, 64, 64)
    problem = random_problem(case, torch.bfloat16)
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(kernel_gradients, case, *problem).result()
    assert_right_gradients("in a thread", case, found, oracle_gradients(case, *problem[:4]))


@pytest.mark.parametrize("documents", [None, (120, 0, 80)])
def test_saves_inputs_out_and_lse_only(documents: tuple[int, ...] | None) -> None:
    case = Case(batch=1, length_q=200, dim=64, causal=True, documents_q=documents)
    inputs = case.tensors(torch.bfloat16, "cuda")
    saved: list[Tensor] = []
    arguments = case.arguments("cuda")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = attention(*inputs, **arguments)
    bounds = arguments.get("cu_seqlens_q")
    *tensors, lse = saved[:5]
    assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in (*inputs, out)]
    assert lse.shape == (1, 4, 200) and lse.dtype == torch.float32
    assert [x.data_ptr() for x in saved[5:]] == ([] if bounds is None else [bounds.data_ptr()] * 2)


# ------------------------------------------------------------------------------------------------------ wrong arguments

ARGUMENTS = (
    "dout", "q", "k", "v", "out", "lse", "softmax_scale", "window_left", "window_right", "cu_seqlens_q", "cu_seqlens_k",
    "deterministic",
)  # fmt: skip
CU_SEQLENS = torch.tensor([0, 40], dtype=torch.int32)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def documents(x: None) -> Tensor:
    return CU_SEQLENS.cuda()


WRONG_ARGUMENTS: list[tuple[dict[str, Callable], str]] = [
    ({"q": lambda x: x.cpu()}, "q must be on a CUDA device like the other tensors"),
    ({"q": lambda x: x[0]}, r"q must be \[batch, seq, heads, head_dim\], found \[40, 4, 64\]"),
    ({"q": lambda x: x.float()}, "q must be bfloat16 or float16 for the compiled kernel, found Float"),
    ({"q": transposed}, "q must have a contiguous last dimension, found stride 4"),
    ({"q": lambda x: x[:, :, :3]}, "the heads of q must be a multiple of those of k, found 3 and 2"),
    ({"q": lambda x: x[:, :39]}, r"dout must be \[2, 39, 4, 64\], found \[2, 40, 4, 64\]"),
    ({"k": lambda x: x.half()}, "q, k and v must have one dtype, found k Half and q BFloat16"),
    ({"k": lambda x: x[:1]}, r"one batch size, found k \[1, 40, 2, 64\] and q \[2, 40, 4, 64\]"),
    ({"k": lambda x: x[..., :32]}, r"q and k must have one head_dim, found q \[2, 40, 4, 64\] and k \[2, 40, 2, 32\]"),
    ({"k": lambda x: x[:, :30]}, "k and v must agree in batch, seq and heads"),
    ({"k": lambda x: x.cpu()}, "k must be on CUDA device 0 like the other tensors"),
    ({"v": lambda x: x[..., :32]}, "the attention kernel takes head dims .*, found 64/32"),
    ({"v": transposed}, "v must have a contiguous last dimension, found stride 2"),
    ({"dout": lambda x: x[..., :32]}, r"dout must be \[2, 40, 4, 64\], found \[2, 40, 4, 32\]"),
    ({"dout": lambda x: x.float()}, "dout must have q's dtype BFloat16, found Float"),
    ({"dout": lambda x: x.cpu()}, "dout must be on CUDA device 0 like the other tensors"),
    ({"out": lambda x: x[0]}, r"out must be \[2, 40, 4, 64\], found \[40, 4, 64\]"),
    ({"out": lambda x: x.half()}, "out must have q's dtype BFloat16, found Half"),
    ({"out": lambda x: x.cpu()}, "out must be on CUDA device 0 like the other tensors"),
    ({"lse": lambda x: x.mT}, r"lse must be \[2, 4, 40\], found \[2, 40, 4\]"),
    ({"lse": lambda x: x.double()}, "lse must be Float, found Double"),
    ({"lse": lambda x: x.cpu()}, "lse must be on CUDA device 0 like the other tensors"),
    ({"softmax_scale": lambda x: -x}, "softmax_scale must be positive for the compiled kernel, found -1"),
    ({"softmax_scale": lambda x: float("nan")}, "softmax_scale must be positive for the compiled kernel, found "),
    ({"cu_seqlens_q": documents}, "cu_seqlens_q and cu_seqlens_k must be given together"),
    ({"cu_seqlens_q": documents, "cu_seqlens_k": documents}, r"with cu_seqlens the batch size must be 1, found q \[2"),
    ({"cu_seqlens_q": lambda x: documents(x).long(), "cu_seqlens_k": documents}, "cu_seqlens_q must be int32"),
    ({"cu_seqlens_q": documents, "cu_seqlens_k": lambda x: documents(x)[:1]}, "must count the same documents"),
    ({"cu_seqlens_q": documents, "cu_seqlens_k": lambda x: CU_SEQLENS}, "cu_seqlens_k must be on CUDA device 0"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG_ARGUMENTS)))
def test_direct_call_names_the_wrong_argument(number: int) -> None:
    changes, text = WRONG_ARGUMENTS[number]
    q, k, v = random_inputs(Case(length_q=40, dim=64), torch.bfloat16)
    given = (q, q, k, v, q, torch.zeros(2, 4, 40, device="cuda"), 1.0, -1, 0, None, None, False)
    arguments = [changes[name](x) if name in changes else x for name, x in zip(ARGUMENTS, given, strict=True)]
    with pytest.raises(RuntimeError, match=text):
        ops.attention_backward(*arguments)
