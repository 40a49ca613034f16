"""Gradients of the experts' weights that are added to given tensors: by the reference, and by the kernels on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashmoe_train import moe
from flashmoe_train.ops.moe import MoECase, WeightGradients, moe_permute, moe_rows, route_plan, supports

from .moe_cases import CASES, Case, parts_of_backward
from .operators import ON_HOPPER, assert_close_in_norm, assert_opcheck, captured

ops = torch.ops.flashmoe
DEVICES = ["cpu", pytest.param("cuda", marks=ON_HOPPER)]
DTYPES = [torch.float32, torch.bfloat16]
SPECIAL = [case for case in CASES if case.experts != 5 or case.routing != "random" or case.tokens != 23]


def inputs_of(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """((x, w1, w2, w3, weights), ids, dout) in bfloat16, of dims that the kernels take."""
    torch.manual_seed(0)
    case = replace(case, hidden=24 if case.hidden == 12 else case.hidden)
    tensors = case.tensors(torch.bfloat16, device)
    assert supports(MoECase.of(*tensors[:2])) is None
    return tensors, case.ids(device), torch.randn(case.tokens, case.dim, device=device).bfloat16()


def random_sums(w: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(x.shape, device=x.device).to(dtype) for x in w)


def as_rows(x: Tensor, weights: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and weights as leaves of rows, and the offsets."""
    plan = route_plan(ids, experts)
    rows = moe_permute(x.detach(), plan.row_slot, plan.slot_row)
    row_weights = moe_permute(weights.detach().reshape(-1, 1), plan.row_slot, plan.slot_row.reshape(-1, 1))
    rows[plan.offsets[-1] :] = torch.nan
    return rows.requires_grad_(), row_weights.squeeze(1).requires_grad_(), plan.offsets


# ----------------------------------------------------------------------------------------------- as autograd gives them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adds_what_autograd_gives(case: Case, device: str, dtype: torch.dtype) -> None:
    """Bitwise, where it is added to zeros and rounded: float32 sums are what autograd's were rounded from."""
    (x, *w, weights), ids, dout = inputs_of(case, device)
    out = moe(x, *w, ids, weights, score_mode=case.score_mode)
    wanted = torch.autograd.grad(out, (x, weights, *w), dout)
    gradients = WeightGradients(*(torch.zeros_like(p, dtype=dtype) for p in w))
    found = moe(x, *w, ids, weights, score_mode=case.score_mode, gradients=gradients)
    assert torch.equal(found, out)
    found.backward(dout)
    assert [p.grad for p in w] == [None] * 3 and len(gradients) == 0
    for a, b in zip((x.grad, weights.grad, *(s.bfloat16() for s in gradients.sums)), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_adds_what_autograd_gives_of_rows(device: str, dtype: torch.dtype) -> None:
    (x, *w, weights), ids, _ = inputs_of(Case(routing="skipped"), device)
    rows, row_weights, offsets = as_rows(x, weights, ids, 5)
    dout = torch.randn_like(rows)
    wanted = torch.autograd.grad(moe_rows(rows, *w, offsets, row_weights), (rows, row_weights, *w), dout)
    gradients = WeightGradients(*(torch.zeros_like(p, dtype=dtype) for p in w))
    moe_rows(rows, *w, offsets, row_weights, gradients=gradients).backward(dout)
    for a, b in zip((rows.grad, row_weights.grad, *(s.bfloat16() for s in gradients.sums)), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_microbatches_add_up(score_mode: str, device: str, delayed: bool) -> None:
    """In float32, as if they had been added in float64; later, when asked to, in the order of the backward passes."""
    batches = [inputs_of(Case(tokens=tokens), device) for tokens in (23, 64)]
    w = batches[0][0][1:4]
    start = random_sums(w, torch.float32)
    gradients = WeightGradients(*(s.clone() for s in start), delayed=delayed)
    wanted = [s.double() for s in start]
    zeros = [torch.zeros_like(s) for s in start]
    for (x, *_, weights), ids, dout in batches:
        moe(x, *w, ids, weights, score_mode=score_mode, gradients=gradients).backward(dout)
        alone = WeightGradients(*(z.clone() for z in zeros))
        moe(x, *w, ids, weights, score_mode=score_mode, gradients=alone).backward(dout)
        wanted = [s + t for s, t in zip(wanted, alone.sums, strict=True)]
    if delayed:
        assert len(gradients) == 2 and all(map(torch.equal, gradients.sums, start))
        gradients.add()
        assert len(gradients) == 1
        gradients.add()
    for found, expected in zip(gradients.sums, wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="no backward pass waits"):
        gradients.add()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("delayed", [False, True])
def test_fallback_adds_too(delayed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels round to the weights' dtype before."""
    monkeypatch.setattr("flashmoe_train.ops.moe.supports", lambda case: "not here")
    torch.manual_seed(0)
    case = Case()
    x, *w, weights = case.tensors(torch.bfloat16, device)
    ids = case.ids(device)
    rows, row_weights, offsets = as_rows(x, weights, ids, 5)
    calls: list[Callable[..., Tensor]] = [
        lambda **gradients: moe(x, *w, ids, weights, **gradients),
        lambda **gradients: moe_rows(rows, *w, offsets, row_weights, **gradients),
    ]
    for call in calls:
        start = random_sums(tuple(w), torch.float32)
        gradients = WeightGradients(*(s.clone() for s in start), delayed=delayed)
        wanted = torch.autograd.grad(call().sum(), w)
        call(gradients=gradients).sum().backward()
        assert len(gradients) == delayed and [p.grad for p in w] == [None] * 3
        if delayed:
            gradients.add()
        for found, before, added in zip(gradients.sums, start, wanted, strict=True):
            torch.testing.assert_close(found, before + added.float())


# ------------------------------------------------------------------------------------------------------- as an operator


def part_arguments(case: Case, device: str) -> tuple[tuple[Tensor, ...], dict[str, tuple]]:
    """w1, w2 and w3; and what the operators that write or add take between the sums and `accumulate`."""
    (x, *w, weights), ids, dout = inputs_of(case, device)
    parts = parts_of_backward((x, *w, weights, *route_plan(ids, case.experts), case.score_mode), dout)
    return tuple(p.detach() for p in w), {name: parts[f"moe_weight_gradient_{name}"] for name in ("down", "up")}


def into(sums: Sequence[Tensor], given: dict[str, tuple], accumulate: bool) -> None:
    ops.moe_weight_gradient_down_(sums[1], *given["down"], accumulate)
    ops.moe_weight_gradient_up_(sums[0], sums[2], *given["up"], accumulate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [Case(), *SPECIAL], ids=str)
def test_writes_or_adds(case: Case, device: str, dtype: torch.dtype) -> None:
    """Written, nothing of what was there is left, whatever it was; added, experts without rows keep it bit by bit. The
    sums may be parts of larger tensors, of which nothing else is touched."""
    w, given = part_arguments(case, device)
    larger = [(p.shape[0] + 1, p.shape[1] + 3, p.shape[2] + 8) for p in w]
    whole = [torch.full(shape, torch.nan, device=device, dtype=dtype) for shape in larger]
    sums = [t[1:, 2:-1, 8:] for t in whole]
    into(sums, given, False)
    dw1, dw3 = ops.moe_weight_gradient_up(*given["up"])
    for found, expected in zip(sums, (dw1, ops.moe_weight_gradient_down(*given["down"]), dw3), strict=True):
        assert torch.equal(found.bfloat16(), expected)
    for t, s in zip(whole, sums, strict=True):
        assert t.isnan().sum() == t.numel() - s.numel()

    offsets = given["up"][2]
    empty = offsets[1:] == offsets[:-1]
    first = [s.clone() for s in sums]
    for s in sums:
        s[empty] = torch.nan
    into(sums, given, True)
    for s, once in zip(sums, first, strict=True):
        assert s[empty].isnan().all()
        assert torch.equal(s[~empty], once[~empty] * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    w, given = part_arguments(Case(), device)  # rows of nobody hold anything
    dw1, dw2, dw3 = random_sums(w, torch.float32)
    for accumulate in (False, True):
        assert_opcheck(ops.moe_weight_gradient_down_.default, (dw2, *given["down"], accumulate))
        assert_opcheck(ops.moe_weight_gradient_up_.default, (dw1, dw3, *given["up"], accumulate))


def test_flops() -> None:
    w, given = part_arguments(Case(), "cpu")
    with FlopCounterMode(display=False) as counter:
        into(random_sums(w, torch.float32), given, True)
    assert counter.get_total_flops() == 3 * 2 * 46 * 24 * 16


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_frozen_weights_cost_no_products(frozen: tuple[int, ...], added: bool) -> None:
    (x, *w, weights), ids, dout = inputs_of(Case(), "cpu")
    wanted = torch.autograd.grad(moe(x, *w, ids, weights), (x, weights, *w), dout)
    given = [p.detach().requires_grad_(i not in frozen) for i, p in enumerate(w)]
    gradients = WeightGradients(*(torch.zeros_like(p) for p in w)) if added else None
    out = moe(x, *given, ids, weights, gradients=gradients)
    with FlopCounterMode(display=False) as counter:
        out.backward(dout)
    products = {*frozen} - ({0} if 2 not in frozen else set())  # those of w1 and w3 are one operator's
    product = counter.get_total_flops() // (6 - len(products))
    assert counter.get_total_flops() == product * (6 - len(products)) and product == 2 * 46 * 24 * 16
    assert torch.equal(x.grad, wanted[0]) and torch.equal(weights.grad, wanted[1])
    found = [p.grad for p in given] if gradients is None else gradients.sums
    for i in {0, 1, 2} - products:
        if i not in frozen:
            assert torch.equal(found[i], wanted[2 + i])
    for i in products:
        assert found[i] is None or not found[i].any()


def test_compiled_code_leaves_it_to_eager_mode() -> None:
    (x, *w, weights), ids, dout = inputs_of(Case(), "cpu")
    gradients, wanted = (WeightGradients(*(torch.zeros_like(p) for p in w)) for _ in range(2))
    moe(x.sin(), *w, ids, weights, gradients=wanted).backward(dout)
    torch.compile(lambda: moe(x.sin(), *w, ids, weights, gradients=gradients), backend="aot_eager")().backward(dout)
    for a, b in zip(gradients.sums, wanted.sums, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_cuda_graph_adds_at_every_replay(device: str) -> None:
    w, given = part_arguments(Case(), device)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in w]

    def add() -> tuple[Tensor, ...]:
        into(sums, given, True)
        return ()

    graph, _ = captured(add)
    once = [s.clone() for s in sums]  # a capture computes nothing
    graph.replay()
    for s, t in zip(sums, once, strict=True):
        assert torch.equal(s, 2 * t) and t.any()


@pytest.mark.parametrize("shape", [(4096, 2048, 1024, 64, 8), (8192, 1024, 512, 8, 2), (2048, 520, 264, 16, 4)])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_larger_shapes(device: str, shape: tuple[int, int, int, int, int]) -> None:
    """Chunks of columns, several tiles, tails: autograd's gradients, unrounded, that repeat bitwise."""
    tokens, dim, hidden, experts, top_k = shape
    (x, *w, weights), ids, dout = inputs_of(Case(tokens, dim, hidden, experts, top_k), device)
    wanted = torch.autograd.grad(moe(x, *w, ids, weights), w, dout)
    start = random_sums(tuple(w), torch.float32)
    results = []
    for _ in range(3):
        gradients = WeightGradients(*(s.clone() for s in start))
        moe(x, *w, ids, weights, gradients=gradients).backward(dout)
        results.append(gradients.sums)
    for name, found, again, third, before, dw in zip("123", *results, start, wanted, strict=True):
        assert torch.equal(found, again) and torch.equal(found, third)
        assert_close_in_norm(f"dw{name}", (found - before).bfloat16(), dw)


# ------------------------------------------------------------------------------------------------------ wrong arguments

WRONG_SUMS: list[tuple[dict[int, Callable[[Tensor], Tensor]], type[Exception], str]] = [
    ({0: lambda s: s[0]}, ValueError, r"dw1 must be \[5, 24, 16\], found \[24, 16\]"),
    ({1: lambda s: s.transpose(1, 2)}, ValueError, r"dw2 must be \[5, 16, 24\], found \[5, 24, 16\]"),
    ({2: lambda s: s[:4]}, ValueError, r"dw3 must be \[5, 24, 16\], found \[4, 24, 16\]"),
    (
        {0: lambda s: s.half()},
        TypeError,
        "must have one dtype .* torch.bfloat16 or torch.float32, found dw1 torch.float16",
    ),
    ({1: lambda s: s.bfloat16()}, TypeError, "must have one dtype .* found dw2 torch.bfloat16"),
    ({2: lambda s: s.to("meta")}, ValueError, "dw3 must be on x's device cpu, found meta"),
    ({0: lambda s: s.mT.contiguous().mT}, ValueError, "dw1 must have a contiguous last dimension"),
]


@pytest.mark.parametrize("changes, error, text", WRONG_SUMS)
@pytest.mark.parametrize("rows", [False, True])
def test_wrong_sums(changes: dict, error: type[Exception], text: str, rows: bool) -> None:
    (x, *w, weights), ids, _ = inputs_of(Case(), "cpu")
    sums = [changes.get(i, lambda s: s)(torch.zeros(p.shape)) for i, p in enumerate(w)]
    with pytest.raises(error, match=text):
        if rows:
            moe_rows(x, *w, torch.tensor([0, 5, 9, 9, 20, 23], dtype=torch.int32), gradients=WeightGradients(*sums))
        else:
            moe(x, *w, ids, weights, gradients=WeightGradients(*sums))


WRONG_PARTS: list[tuple[str, Callable, str]] = [
    ("dw1", lambda s: s[0], r"dw1 must be \[experts, hidden dim, model dim\], found \[24, 16\]"),
    ("dw1", lambda s: s[..., :8], r"dw1 must be \[5, 24, 16\], found \[5, 24, 8\]"),
    ("dw2", lambda s: s[:, :8], r"dw2 must be \[5, 16, 24\], found \[5, 8, 24\]"),
    ("dw3", lambda s: s[:4], r"dw3 must be \[5, 24, 16\], found \[4, 24, 16\]"),
    ("dout", lambda x: x[:9], r"slot_row must have a row per token of dout, found \[23, 2\] and \[9, 16\]"),
    ("x", lambda x: x[0], r"x must have 2 dimensions, found \[16\]"),
    ("dh", lambda x: x[:, :24], r"dh must be \[46, 48\], found \[46, 24\]"),
    ("a", lambda x: x.float(), "a must have dout's dtype .*, found .*[Ff]loat"),
    ("a", lambda x: x[0], r"a must have 2 dimensions, found \[24\]"),
    ("offsets", lambda x: x[:5], r"offsets must be \[experts \+ 1\] = \[6\], found \[5\]"),
    ("row_slot", lambda x: None, "row_slot and slot_row must be given together"),
    ("slot_row", lambda x: x[:9], r"slot_row must have a row per token of \w+, found \[9, 2\] and \[23, 16\]"),
]
GPU_WRONG_PARTS: list[tuple[str, Callable, str]] = [
    (
        "dw1",
        lambda s: torch.zeros(5, 24, 18, device="cuda")[..., 1:17],
        "dw1 must have contiguous rows that begin at multiples",
    ),
    ("dw2", lambda s: s.half(), "dw2 must be Float or of dout's dtype BFloat16, found Half"),
    ("dw3", lambda s: s.bfloat16(), "dw3 must have dw1's dtype Float, found BFloat16"),
    ("dw3", lambda s: s[:1].expand(5, -1, -1), "dw3 must have contiguous rows"),
    ("dw1", lambda s: s.cpu(), "dw1 must be on CUDA device 0"),
]


@pytest.mark.parametrize(
    "device, name, change, text",
    [("cpu", *wrong) for wrong in WRONG_PARTS]
    + [pytest.param("cuda", *wrong, marks=ON_HOPPER) for wrong in WRONG_PARTS + GPU_WRONG_PARTS],
)
def test_direct_call_names_the_wrong_argument(device: str, name: str, change: Callable, text: str) -> None:
    w, given = part_arguments(Case(), device)
    dw1, dw2, dw3 = random_sums(w, torch.float32)
    names = {
        "down": ("dw2", "dout", "a", "offsets", "row_slot", "slot_row"),
        "up": ("dw1", "dw3", "x", "dh", "offsets", "row_slot", "slot_row"),
    }
    sums = {"down": (dw2,), "up": (dw1, dw3)}
    for part in ("down", "up"):
        arguments = dict(zip(names[part], (*sums[part], *given[part]), strict=True))
        if name not in arguments:
            continue
        arguments[name] = change(arguments[name])
        operator = getattr(ops, f"moe_weight_gradient_{part}_")
        with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
            operator(*arguments.values(), True)
