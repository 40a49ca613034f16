"""The correctness contract of the experts' CUDA kernels: exact enough for every routing, NaN stays where it is,
everything repeats bitwise.

    compute-sanitizer --tool memcheck python -m pytest tests/ops/test_moe_gpu.py -k sanitizer

runs every kernel on a few tiny cases; with PYTORCH_NO_CUDA_MEMORY_CACHING=1 it sees where each tensor ends.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashmoe_train.bench.moe_reference import forward_error, gradient_error
from flashmoe_train.ops.moe import fallback, route_plan

from .moe_cases import CASES, Case, backward_by_operators
from .moe_gpu import (
    DTYPES,
    NAMES,
    NORM,
    Rows,
    assert_right,
    beyond_contract,
    by_operators,
    exact,
    kernel,
    kernel_rows,
    results,
    spoil,
)
from .operators import ON_HOPPER, chooser

pytestmark = ON_HOPPER
SCORE_MODES = pytest.mark.parametrize("score_mode", ["combine", "activation"])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_case_is_right(case: Case, dtype: torch.dtype) -> None:
    inputs, ids = case.tensors(dtype, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").to(dtype)
    assert_right(f"{case} {dtype}", results(kernel(case, ids), inputs, dout), exact(*inputs, ids, dout))


# ------------------------------------------------------------------------------------------------------ how exact it is

CONTRACT = [
    Case(1000, dim=1024, hidden=512, experts=64, top_k=8),
    Case(1000, dim=520, hidden=328, experts=8),  # no multiples of 64, nor of 256, nor of a chunk
    Case(1000, dim=1160, hidden=264, experts=8),
    Case(1000, dim=200, hidden=1000, experts=8),
    Case(1000, dim=8, hidden=264, experts=8),
    Case(1000, dim=264, hidden=8, experts=8),
    Case(1000, dim=8, hidden=8, experts=4),
    Case(257, dim=2048, hidden=768, experts=16, top_k=4),
    Case(3000, dim=512, hidden=128, experts=1, top_k=1),
    Case(1000, dim=256, hidden=256, experts=64, top_k=8, routing="zipf"),
    Case(1000, dim=256, hidden=192, experts=8, routing="skipped"),
]


@EACH_DTYPE
@SCORE_MODES
@pytest.mark.parametrize("case", CONTRACT, ids=str)
def test_contract(case: Case, score_mode: str, dtype: torch.dtype) -> None:
    """As exact as PyTorch's products, which round more often."""
    case = replace(case, score_mode=score_mode)
    inputs, ids = case.tensors(dtype, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").to(dtype)
    found, yardstick = results(kernel(case, ids), inputs, dout), results(plain(case, ids), inputs, dout)
    wanted = exact(*inputs, ids, dout)
    assert not beyond_contract(found, wanted, yardstick)
    assert_right("", found, wanted)


@EACH_DTYPE
@pytest.mark.parametrize("dim, hidden", [(520, 328), (1024, 512), (1160, 264)])
def test_contract_of_rows(dim: int, hidden: int, dtype: torch.dtype) -> None:
    rows = Rows.of((700, 0, 129, 300, 1, 64), 0, dim, hidden, dtype, "cuda")

    def plain_rows(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor) -> Tensor:
        return fallback.moe_rows(x, w1, w2, w3, rows.offsets, weights)

    found, yardstick = (results(f, rows.inputs, rows.dout) for f in (kernel_rows(rows.offsets), plain_rows))
    assert not beyond_contract(found, rows.exact(weighted=True), yardstick)


@EACH_DTYPE
@pytest.mark.parametrize("hidden", [72, 264])
@pytest.mark.parametrize("dim", [136, 512, 520, 1024, 1160])
def test_chunks_of_columns(dim: int, hidden: int, dtype: torch.dtype) -> None:
    """Backward permutes tokens by chunks of columns: what that gives is bitwise what rows in one piece do."""
    case = Case(700, dim, hidden, experts=8, top_k=2, routing="skipped", score_mode="activation")
    x, w1, w2, w3, weights = (t.detach() for t in case.tensors(dtype, "cuda"))
    dout = torch.randn_like(x)
    offsets, row_slot, slot_row = plan = route_plan(case.ids("cuda"), case.experts)
    rows, drows = (torch.ops.flashmoe.moe_permute(t, row_slot, slot_row) for t in (x, dout))
    of_rows = weights.view(-1)[row_slot.clamp(min=0)]
    spoil(x, w1, len(rows))
    _, _, dx, _, *dw = by_operators((x, w1, w2, w3, weights), plan, case.score_mode, dout)
    inputs = rows, w1, w2, w3, of_rows
    _, _, dx_rows, _, *wanted = by_operators(inputs, (offsets, None, None), case.score_mode, drows)
    assert torch.equal(dx, torch.ops.flashmoe.moe_combine(dx_rows, slot_row, None))
    for name, y, z in zip(("dw1", "dw2", "dw3"), dw, wanted, strict=True):
        assert torch.equal(y, z), name


def plain(case: Case, ids: Tensor) -> Callable[..., Tensor]:
    """The yardstick: PyTorch's grouped products in the inputs' dtype."""

    def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor) -> Tensor:
        return fallback.moe(x, w1, w2, w3, weights, route_plan(ids, case.experts), case.score_mode)

    return run


def swapped(inputs: Sequence[Tensor], ids: Tensor, slot: int) -> tuple[Sequence[Tensor], Tensor]:
    x, w1, w2, w3, weights = inputs
    return (x, w3, w2, w1, weights), ids


def dropped(inputs: Sequence[Tensor], ids: Tensor, slot: int) -> tuple[Sequence[Tensor], Tensor]:
    ids = ids.clone()
    ids.view(-1)[slot] = -1
    return inputs, ids


def of_another_expert(inputs: Sequence[Tensor], ids: Tensor, slot: int) -> tuple[Sequence[Tensor], Tensor]:
    ids = ids.clone()
    ids.view(-1)[slot] = (ids.view(-1)[slot] + 1) % len(inputs[1])
    return inputs, ids


@EACH_DTYPE
@pytest.mark.parametrize("mistake", [swapped, dropped, of_another_expert])
def test_contract_notices(mistake: Callable, dtype: torch.dtype) -> None:
    """Gate and up in the wrong order, or one wrong row of 8000, is beyond the contract in all that it changes."""
    case = CONTRACT[0]
    inputs, ids = case.tensors(dtype, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").to(dtype)
    # dweights of a slot may be small by chance, and weights are: here they are not.
    slot = int(exact(*inputs, ids, dout)[5].abs().argmax())
    inputs[4].data.view(-1)[slot] = 0.5
    wanted, yardstick = exact(*inputs, ids, dout), results(plain(case, ids), inputs, dout)
    wrong_inputs, wrong_ids = mistake(inputs, ids, slot)
    found = results(kernel(case, wrong_ids), wrong_inputs, dout)
    assert len(beyond_contract(found, wanted, yardstick)) == len(NAMES)


# -------------------------------------------------------------------------------------------------------- every routing

ROUTINGS = [
    *(replace(case, dim=136, hidden=72) for case in CASES),
    *(Case(300, 136, 72, 8, 2, routing) for routing in ("random", "one", "even", "skipped", "duplicate", "zipf")),
    Case(300, 136, 72, experts=8, top_k=8),
    Case(300, 136, 72, experts=64, top_k=16),
    Case(300, 136, 72, experts=3, top_k=16, routing="skipped"),  # an expert several times in a token
    Case(700, 136, 72, experts=512, top_k=8),
    Case(3, 136, 72, experts=512, top_k=2),
    Case(3000, 136, 72, experts=64, top_k=8, routing="zipf"),
    Case(3000, 136, 72, experts=512, top_k=16, routing="zipf"),
    Case(100, 8, 8, experts=4096, top_k=2),  # the most there may be
    Case(2000, 264, 264, experts=4, top_k=1, routing="one"),
    Case(0, 264, 264, experts=512, top_k=8),
    # Of experts so wide that their products copy tokens themselves.
    *(
        Case(300, 136, 776, 8, 2, routing)
        for routing in ("random", "one", "even", "skipped", "duplicate", "nobody", "zipf")
    ),
    Case(1, 136, 776, experts=4, top_k=1),
    Case(0, 264, 776, experts=8, top_k=2),
    Case(600, 264, 776, experts=4, top_k=3, routing="one"),
    Case(3000, 264, 776, experts=64, top_k=8, routing="zipf"),
    Case(700, 1032, 776, experts=512, top_k=8),  # and most of all are gradients
    Case(9000, 2056, 776, experts=3, top_k=2),  # in halves
]


@EACH_DTYPE
@SCORE_MODES
@pytest.mark.parametrize("case", ROUTINGS, ids=str)
def test_every_routing(case: Case, score_mode: str, dtype: torch.dtype) -> None:
    assert_case_is_right(replace(case, score_mode=score_mode), dtype)


COUNTS = (0, 1, 63, 64, 65, 127, 128, 129, 193, 256)
ROW_COUNTS = [
    COUNTS,
    COUNTS[::-1],
    (1,) * 70,
    (0, 0, 0),
    *((0, count, 0, 2) for count in COUNTS),
    *((count,) for count in COUNTS),
]


@EACH_DTYPE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spare", [0, 37, 300])
@pytest.mark.parametrize("counts", ROW_COUNTS, ids=str)
def test_rows_of_each_count(counts: tuple[int, ...], spare: int, weighted: bool, dtype: torch.dtype) -> None:
    """Tiles that are full, one row short and one row over. Rows of nobody hold NaN, which nothing sees."""
    rows = Rows.of(counts, spare, 136, 264, dtype, "cuda")
    inputs = rows.inputs if weighted else rows.inputs[:4]
    found = results(kernel_rows(rows.offsets), inputs, rows.dout)
    assert_right("", found, rows.exact(weighted))  # among it: nobody's rows are zero


@pytest.mark.parametrize("chunk", range(12))
def test_random_cases(chunk: int) -> None:
    pick = chooser(seed=chunk)
    for _ in range(170):
        experts = pick(1, 2, 3, 7, 16, 33, 64)
        routing = pick("random", "random", "one", "even", "skipped", "duplicate", "nobody", "zipf")
        top_k = pick(1, 2, 3, 4, 6, 8, 9)
        case = Case(
            tokens=pick(0, 1, 2, 7, 31, 63, 64, 65, 100, 127, 128, 129, 200, 300),
            dim=pick(8, 16, 40, 56, 64, 72, 128, 136, 200, 256, 264, 328),
            hidden=pick(8, 16, 40, 56, 64, 72, 128, 136, 200, 256, 264, 328, 768, 776, 1032),
            experts=experts,
            top_k=min(top_k, experts) if routing in ("random", "zipf") else top_k,
            routing=routing,
            score_mode=pick("combine", "activation"),
        )
        assert_case_is_right(case, pick(*DTYPES))


# Elements: of h [R, 2n], of the rows [R, d], of the weights [E, n, d].
LARGE = [Case(66_000, 512, 2048, 8, 8), Case(66_000, 4096, 64, 8, 8), Case(600, 2056, 2048, 512, 2)]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_than_2_to_the_31_elements(case: Case) -> None:
    rows = case.tokens * case.top_k
    assert max(rows * 2 * case.hidden, rows * case.dim, case.experts * case.hidden * case.dim) > 2**31
    shapes = [(case.tokens, case.dim)] * 2 + [(case.experts, case.hidden, case.dim)] * 2
    x, dout, w1, w3 = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    w2 = torch.randn(case.experts, case.dim, case.hidden, device="cuda", dtype=torch.bfloat16)
    w1.mul_(case.dim**-0.5), w3.mul_(case.dim**-0.5), w2.mul_(case.hidden**-0.5)
    weights, ids = torch.rand(case.tokens, case.top_k, device="cuda"), case.ids("cuda")
    inputs = tuple(t.requires_grad_() for t in (x, w1, w2, w3, weights))
    out, *gradients = results(kernel(case, ids), inputs, dout)
    with torch.no_grad():
        assert forward_error(inputs, ids, out) <= NORM[x.dtype]
        assert gradient_error(inputs, ids, dout, gradients) <= NORM[x.dtype]


# --------------------------------------------------------------------------------------------------- NaN stays in place

NEIGHBOURS = Case(300, 136, 72, experts=16, top_k=2)


@SCORE_MODES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", ["first", "last"])
@pytest.mark.parametrize("where", ["x", "dout"])
def test_nan_stays_with_its_token(where: str, row: str, value: float, score_mode: str) -> None:
    """Of a token whose row has another expert's beside it."""
    case = replace(NEIGHBOURS, score_mode=score_mode)
    inputs, ids = case.tensors(torch.bfloat16, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").bfloat16()
    run = functools.partial(results, kernel(case, ids), inputs)
    wanted = run(dout)
    offsets, row_slot, _ = route_plan(ids, case.experts)
    token = int(row_slot[offsets[5] if row == "first" else offsets[6] - 1]) // case.top_k
    (inputs[0].data if where == "x" else dout)[token] = value
    found = run(dout)
    others = torch.arange(case.tokens, device="cuda") != token
    experts = torch.ones(case.experts, dtype=torch.bool, device="cuda")
    experts[ids[token].long()] = False
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        untouched = experts if name in ("dw1", "dw2", "dw3") else others
        assert torch.equal(x[untouched], y[untouched]), name
        if where == "x" or name != "out":
            assert not x[~untouched].isfinite().all(), name
        else:
            assert torch.equal(x, y)


@SCORE_MODES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weight_of_a_skipped_slot_is_not_used(value: float, score_mode: str) -> None:
    case = replace(NEIGHBOURS, routing="skipped", score_mode=score_mode)
    inputs, ids = case.tensors(torch.bfloat16, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").bfloat16()
    run = functools.partial(results, kernel(case, ids), inputs, dout)
    wanted = run()
    skipped = (ids < 0) | (ids >= case.experts)
    assert skipped.any()
    inputs[4].data[skipped] = value
    for name, x, y in zip(NAMES, run(), wanted, strict=True):
        assert torch.equal(x, y), name


def test_experts_of_nobody_are_not_used() -> None:
    """Nor are tokens of which all slots are skipped."""
    case = NEIGHBOURS
    inputs, ids = case.tensors(torch.bfloat16, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").bfloat16()
    ids[ids == 7] = -1
    ids[ids == 15] = 99
    ids[4] = -5
    run = functools.partial(results, kernel(case, ids), inputs, dout)
    wanted = run()
    for w in inputs[1:4]:
        w.data[[7, 15]] = torch.nan
    inputs[0].data[4] = dout[4] = torch.nan
    for name, x, y in zip(NAMES, run(), wanted, strict=True):
        assert torch.equal(x, y), name


@EACH_DTYPE
def test_rows_of_nobody_in_h_are_not_read(dtype: torch.dtype) -> None:
    """The forward need not write them."""
    case = replace(NEIGHBOURS, routing="skipped")
    x, w1, w2, w3, weights = (t.detach() for t in case.tensors(dtype, "cuda"))
    plan = route_plan(case.ids("cuda"), case.experts)
    dout = torch.randn_like(x)
    _, h = torch.ops.flashmoe.moe_forward(x, w1, w2, w3, weights, *plan, case.score_mode)
    gradients = []
    for value in (0, torch.nan):
        h[plan.offsets[-1] :] = value
        arguments = dout, x, w1, w2, w3, weights, h, *plan, case.score_mode
        gradients.append(backward_by_operators(*arguments))
    for y, z in zip(*gradients, strict=True):
        assert torch.equal(y, z)


@EACH_DTYPE
@SCORE_MODES
def test_rows_without_a_slot(score_mode: str, dtype: torch.dtype) -> None:
    """Among an expert's rows: as if their slots had been skipped. They are zeros, whatever their token holds."""
    case = replace(NEIGHBOURS, score_mode=score_mode)
    inputs, ids = case.tensors(dtype, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").to(dtype)
    offsets, row_slot, slot_row = route_plan(ids, case.experts)
    token = int(row_slot[offsets[5]]) // case.top_k
    slots = torch.tensor([token * case.top_k, token * case.top_k + 1, int(row_slot[offsets[9] - 1])], device="cuda")
    rows = slot_row.view(-1)[slots]
    row_slot[rows], slot_row.view(-1)[slots], ids.view(-1)[slots] = -1, -1, -1
    inputs[0].data[token] = dout[token] = torch.nan
    out, h, dx, dweights, *dw = by_operators(
        [t.detach() for t in inputs], (offsets, row_slot, slot_row), case.score_mode, dout
    )
    assert_right("", (out, dx, *dw, dweights), exact(*inputs, ids, dout))
    assert not h[rows].any()


# ------------------------------------------------------------------------------------------------------ again and again


@EACH_DTYPE
@pytest.mark.parametrize("routing", ["random", "zipf"])
def test_repeats_bitwise(routing: str, dtype: torch.dtype) -> None:
    """Whatever else the GPU does at the time."""
    case = Case(2048, dim=512, hidden=264, experts=32, top_k=4, routing=routing)
    inputs, ids = case.tensors(dtype, "cuda"), case.ids("cuda")
    dout = torch.randn(case.tokens, case.dim, device="cuda").to(dtype)
    run = functools.partial(results, kernel(case, ids), inputs, dout)
    first = run()
    stream, other = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    for turn in range(20):
        with torch.cuda.stream(stream):
            for _ in range(turn):  # ever more of it, so that it meets other kernels
                torch.mm(other, other)
        for name, x, y in zip(NAMES, run(), first, strict=True):
            assert torch.equal(x, y), name
    torch.cuda.current_stream().wait_stream(stream)


# ------------------------------------------------------------------------------------------------ for compute-sanitizer

TINY = [
    Case(5, 8, 8, 3, routing="skipped"),
    Case(150, 72, 40, 4),
    Case(70, 264, 136, 2, top_k=1, routing="one"),
    Case(70, 520, 776, 2, routing="skipped"),  # products copy rows themselves, and dw2 comes last
]


@EACH_DTYPE
@SCORE_MODES
@pytest.mark.parametrize("case", TINY, ids=str)
def test_sanitizer_tokens(case: Case, score_mode: str, dtype: torch.dtype) -> None:
    assert_case_is_right(replace(case, score_mode=score_mode), dtype)


@EACH_DTYPE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts, spare", [((2, 0, 3), 4), ((65, 129, 0), 1)], ids=str)
def test_sanitizer_rows(counts: tuple[int, ...], spare: int, weighted: bool, dtype: torch.dtype) -> None:
    rows = Rows.of(counts, spare, 72, 40, dtype, "cuda")
    inputs = rows.inputs if weighted else rows.inputs[:4]
    assert_right("", results(kernel_rows(rows.offsets), inputs, rows.dout), rows.exact(weighted))


# No routing: of 90 rows and 5 experts.
GARBAGE = [
    (-7, 3, 20, 41, 60, 90),
    (0, 40, 10, 80, 5, 90),
    (90, 70, 50, 30, 10, 0),
    (0, 10, 20, 30, 40, 2**31 - 1),
    (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1, -1, 91),
    (2**31 - 1,) * 6,
    (-(2**31),) * 6,
]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("values", GARBAGE, ids=str)
def test_sanitizer_garbage_offsets(values: tuple[int, ...], routed: bool) -> None:
    """Whatever they are, the kernels end, and touch nothing outside their tensors."""
    case = Case(45 if routed else 90, 72, 40, 5, 2 if routed else 1, score_mode="activation")
    *inputs, weights = (t.detach() for t in case.tensors(torch.bfloat16, "cuda"))
    inputs.append(weights if routed else weights.squeeze(1))
    offsets = torch.tensor(values, dtype=torch.int32, device="cuda")
    maps = route_plan(case.ids("cuda"), case.experts)[1:] if routed else (None, None)
    run = functools.partial(by_operators, inputs, (offsets, *maps), case.score_mode, torch.randn_like(inputs[0]))
    # Of every result's shape several tensors, and between them the memory that the allocator has for the next call.
    fences = [torch.full_like(x, 7) for x in run() for _ in range(12)]
    del fences[::2]
    copies = [x.clone() for x in inputs]
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    assert all((x == 7).all() for x in fences)
    for x, y in zip(inputs, copies, strict=True):
        assert torch.equal(x, y)
