"""Backward of the experts, operator by operator: which tensors are alive when, and what it needs at most."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flashmoe_train.bench.measure import free
from flashmoe_train.ops.moe import MoECase, WeightGradients, moe, moe_rows, route_plan, supports
from flashmoe_train.ops.moe import reference as references

from .moe_cases import Case, backward_by_operators, parts_of_backward
from .operators import ON_HOPPER, saving

ops = torch.ops.flashmoe

KEPT = Case(300, dim=40, hidden=24)  # rows of dout
TWICE = Case(300, dim=40, hidden=32)  # permuted
LATE = Case(dim=24, hidden=40)  # and the gradient of w2 comes last

# What is alive when an operator begins, in the order in which they run.
ALIVE: dict[Case, list[tuple[str, set[str]]]] = {
    KEPT: [
        ("moe_down_backward", {"h"}),
        ("moe_weight_gradient_down", {"dh", "a", "dy"}),
        ("moe_up_backward", {"dh"}),
        ("moe_weight_gradient_up", {"dh"}),
    ],
    TWICE: [
        ("moe_down_backward", {"h"}),
        ("moe_weight_gradient_down", {"dh", "a"}),
        ("moe_up_backward", {"dh"}),
        ("moe_weight_gradient_up", {"dh"}),
    ],
    LATE: [
        ("moe_down_backward", {"h"}),
        ("moe_up_backward", {"dh", "a"}),
        ("moe_weight_gradient_up", {"dh", "a"}),
        ("moe_weight_gradient_down", {"a"}),
    ],
}


@contextmanager
def watched() -> Iterator[list[tuple[str, set[str]]]]:
    """Records, of every operator of backward that runs on the CPU, its name and which of the tensors that are there for
    backward alone are alive as it begins. Compiled code too: the operators' implementations are what watches."""
    seen: list[tuple[str, set[str]]] = []
    made: dict[str, StorageWeakRef] = {}

    def watching(name: str, function: Callable[..., Any], results: tuple[str, ...]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            if name != "moe_forward":
                seen.append((name.rstrip("_"), {of for of, storage in made.items() if not storage.expired()}))
            found = function(*arguments)
            for of, tensor in zip(results, found if results else (), strict=True):
                if of and tensor.numel():
                    made[of] = StorageWeakRef(tensor.untyped_storage())
            return found

        return run

    library = torch.library.Library("flashmoe", "IMPL")
    try:
        for name, results in (
            ("moe_forward", ("", "h")),
            ("moe_down_backward", ("dh", "a", "", "dy")),
            ("moe_up_backward", ()),
            ("moe_weight_gradient_down_", ()),
            ("moe_weight_gradient_up_", ()),
        ):
            function = getattr(references, "reference_" + name.removeprefix("moe_"))
            library.impl(name, watching(name, function, results), "CPU", allow_override=True)
        yield seen
    finally:
        library._destroy()


def forward(case: Case) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Inputs that require gradients, and out as a function of them."""
    torch.manual_seed(0)
    inputs, ids = case.tensors(), case.ids()

    def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor) -> Tensor:
        return moe(x, w1, w2, w3, ids, weights, score_mode=case.score_mode)

    return inputs, run


# --------------------------------------------------------------------------------------------------- what is alive when


@pytest.mark.parametrize("case", ALIVE, ids=str)
def test_nothing_lives_longer_than_it_is_needed(case: Case) -> None:
    inputs, run = forward(case)
    with watched() as seen:
        run(*inputs).sum().backward()
    assert seen == ALIVE[case]


def test_rows_are_not_permuted_and_live_no_longer() -> None:
    (x, *w, _), _ = forward(KEPT)
    offsets = torch.tensor([0, 5, 90, 90, 200, 300], dtype=torch.int32)
    with watched() as seen:
        moe_rows(x, *w, offsets).sum().backward()
    assert seen == ALIVE[TWICE]  # dout's rows are dout


@pytest.mark.parametrize("case", ALIVE, ids=str)
def test_nor_in_compiled_code(case: Case) -> None:
    inputs, run = forward(case)
    with watched() as seen:
        torch.compile(run, fullgraph=True)(*inputs).sum().backward()
    assert seen == ALIVE[case]


def test_nor_where_checkpointing_has_saved_it() -> None:
    inputs, run = forward(KEPT)
    context = saving(ops.moe_forward.default, ops.route_plan.default)
    with watched() as seen:
        out = checkpoint(run, *inputs, use_reentrant=False, context_fn=context)
        out.sum().backward()
    assert seen == ALIVE[KEPT]


def test_nor_where_gradients_are_added() -> None:
    (x, *w, weights), _ = forward(KEPT)
    gradients = WeightGradients(*(torch.zeros_like(p) for p in w))
    with watched() as seen:
        moe(x, *w, KEPT.ids(), weights, gradients=gradients).sum().backward()
    assert seen == ALIVE[KEPT]


def test_delayed_gradients_keep_no_rows() -> None:
    (x, *w, weights), _ = forward(KEPT)
    gradients = WeightGradients(*(torch.zeros_like(p) for p in w), delayed=True)
    with watched() as seen:
        moe(x, *w, KEPT.ids(), weights, gradients=gradients).sum().backward()
        gradients.add()
    assert seen == [
        ("moe_down_backward", {"h"}),
        ("moe_up_backward", {"dh", "a"}),
        ("moe_weight_gradient_down", {"dh", "a"}),
        ("moe_weight_gradient_up", {"dh"}),
    ]


def test_a_graph_that_is_kept_keeps_what_it_saved() -> None:
    """So its next backward gives the same again; the last one lets it go."""
    inputs, run = forward(KEPT)
    found = []
    with watched() as seen:
        loss = run(*inputs).square().sum()
        for keep in (True, False):
            found.append(torch.autograd.grad(loss, inputs, retain_graph=keep))
    assert seen == [(name, alive | {"h"}) for name, alive in ALIVE[KEPT]] + ALIVE[KEPT]
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, inputs)


# --------------------------------------------------------------------------------------------------------- as operators


def parts(case: Case = KEPT, device: str = "cpu") -> dict[str, tuple]:
    inputs = case.tensors(device=device)
    dout = torch.randn(case.tokens, case.dim, device=device)
    return parts_of_backward((*inputs, *route_plan(case.ids(device), case.experts), case.score_mode), dout)


@pytest.mark.parametrize("case", [KEPT, replace(KEPT, tokens=23, routing="skipped"), replace(KEPT, tokens=0)], ids=str)
def test_kept_rows_are_those_of_dout(case: Case) -> None:
    """Bitwise: the gradient of w2 from them is that from dout. Not asked for, or without a plan, there are none."""
    given = parts(case)
    dout, _, _, _, offsets, row_slot, slot_row, *_ = down = given["moe_down_backward"]
    _, a, _, dy = ops.moe_down_backward(*down)
    assert torch.equal(dy, ops.moe_permute(dout, row_slot, slot_row))
    wanted = ops.moe_weight_gradient_down(dout, a, offsets, row_slot, slot_row)
    assert torch.equal(ops.moe_weight_gradient_down(dy, a, offsets, None, None), wanted)
    assert ops.moe_down_backward(*down[:-1], False)[3].shape == (0, case.dim)
    of_rows = dy, down[1], None, down[3], offsets, None, None, "activation", True
    assert ops.moe_down_backward(*of_rows)[3].shape == (0, case.dim)


def test_flops() -> None:
    products = {
        "moe_down_backward": 1,
        "moe_weight_gradient_down": 1,
        "moe_up_backward": 2,
        "moe_weight_gradient_up": 2,
    }
    for name, given in parts().items():
        with FlopCounterMode(display=False) as counter:
            getattr(ops, name)(*given)
        assert counter.get_total_flops() == products[name] * 2 * 600 * 40 * 24


WRONG: list[tuple[str, int, Callable[[Any], Any], type[Exception], str]] = [
    ("moe_down_backward", 0, lambda x: x[0], ValueError, r"dout must have 2 dimensions, found \[40\]"),
    ("moe_down_backward", 0, lambda x: x[:, :8], ValueError, r"dout must be \[300, 40\], found \[300, 8\]"),
    ("moe_down_backward", 0, lambda x: x[:9], ValueError, "slot_row must have a row per token of dout"),
    ("moe_down_backward", 1, lambda w: w[0], ValueError, r"w2 must be \[experts, model dim, hidden dim\], found"),
    (
        "moe_down_backward",
        1,
        lambda w: w.half(),
        TypeError,
        "w2 must have dout's dtype torch.float32, found torch.float16",
    ),
    ("moe_down_backward", 1, lambda w: w.to("meta"), ValueError, "w2 must be on dout's device cpu, found meta"),
    ("moe_down_backward", 2, lambda w: w[:, 0], ValueError, r"weights must be \[300, 2\], found \[300\]"),
    ("moe_down_backward", 3, lambda h: h[:9], ValueError, r"h must be \[600, 48\], found \[9, 48\]"),
    ("moe_down_backward", 3, lambda h: h.half(), TypeError, "h must have dout's dtype"),
    ("moe_down_backward", 5, lambda x: None, ValueError, "row_slot and slot_row must be given together"),
    ("moe_down_backward", 7, lambda x: "before", ValueError, r"score_mode must be one of .*, found 'before'"),
    ("moe_up_backward", 0, lambda x: x[:, :24], ValueError, r"dh must be \[600, 48\], found \[600, 24\]"),
    ("moe_up_backward", 0, lambda x: x.mT.contiguous().mT, ValueError, "dh must have a contiguous last dimension"),
    ("moe_up_backward", 1, lambda w: w[0], ValueError, r"w1 must be \[experts, hidden dim, model dim\], found"),
    ("moe_up_backward", 2, lambda w: w[:4], ValueError, r"w3 must be \[5, 24, 40\], found \[4, 24, 40\]"),
    ("moe_up_backward", 3, lambda x: x.long(), TypeError, "offsets must be int32, found torch.int64"),
    ("moe_weight_gradient_down", 0, lambda x: x[0], ValueError, r"dout must have 2 dimensions, found \[40\]"),
    ("moe_weight_gradient_down", 1, lambda a: a[:9], ValueError, r"a must be \[600, 24\], found \[9, 24\]"),
    ("moe_weight_gradient_down", 2, lambda x: x[:, None], ValueError, "offsets must have 1 dimension, found"),
    ("moe_weight_gradient_up", 0, lambda x: x.half(), TypeError, "dh must have x's dtype torch.float16"),
    ("moe_weight_gradient_up", 1, lambda x: x[:, 1:], ValueError, r"dh must be \[600, 46\], found \[600, 47\]"),
    ("moe_weight_gradient_up", 4, lambda x: x[:9], ValueError, "slot_row must have a row per token of x"),
]


@pytest.mark.parametrize("name, position, change, error, text", WRONG)
def test_direct_call_names_the_wrong_argument(
    name: str, position: int, change: Callable[[Any], Any], error: type[Exception], text: str
) -> None:
    given = list(parts()[name])
    given[position] = change(given[position])
    with pytest.raises(error, match=text):
        getattr(ops, name)(*given)


# -------------------------------------------------------------------------------------------------------------- on GPUs


def most_alive(tokens: int, dim: int, hidden: int, experts: int, top_k: int) -> int:
    """Numbers that are alive at once where the most are, beside the inputs: docs/kernels/moe.md."""
    rows, dw = tokens * top_k, experts * hidden * dim
    last, kept = hidden > dim, 5 * hidden <= 3 * dim
    chunk = max(512, dim // (1 if experts * dim <= rows else 2 if 4 * rows * hidden * dim < 1e12 else 4))
    a = hidden * last  # still there
    return tokens * dim + max(
        rows * (3 * hidden + dim),  # forward: h, a and the rows of out
        rows * max(5 * hidden + dim * kept, 3 * hidden + dim),  # h, dh, a, the rows of dout
        rows * (3 * hidden + dim) + dw,
        rows * (2 * hidden + a + dim) + (0 if last else dw) + tokens * dim,  # dh and the rows of dx
        rows * (2 * hidden + a + chunk) + (2 if last else 3) * dw + tokens * dim,
        rows * (a + chunk * last) + 3 * dw + tokens * dim,
    )


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_HOPPER)])
@pytest.mark.parametrize(
    "case",
    [
        Case(4096, 1024, 512, 8, 4),  # most beside the rows of dout
        Case(4096, 1024, 768, 8, 4),  # most in SwiGLU's gradient
        Case(8192, 2048, 512, 64, 4),  # beside the gradients of w1 and w3, rows in halves
        Case(16384, 2048, 2048, 64, 4),  # and in quarters
        Case(4096, 1024, 2048, 32, 4),  # beside those of w2, which come last
    ],
    ids=str,
)
def test_peak(case: Case, device: str) -> None:
    """Of forward and backward: what the operators' order allows, and a little for maps, weights and counters."""
    inputs, ids = case.tensors(torch.bfloat16, device), case.ids(device)
    dout = torch.randn_like(inputs[0])
    assert supports(MoECase.of(*inputs[:2])) is None
    free()  # of a cached block the allocator may count more than it was asked for
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(moe(*inputs[:4], ids, inputs[4]), inputs, dout)
    peak = torch.cuda.max_memory_allocated() - before
    allowed = 2 * most_alive(case.tokens, case.dim, case.hidden, case.experts, case.top_k)
    assert 0.9 * allowed <= peak <= 1.02 * allowed


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_HOPPER)])
@pytest.mark.parametrize("score_mode", ["combine", "activation"])
@pytest.mark.parametrize("keep_rows", [False, True])
@pytest.mark.parametrize("case", [KEPT, TWICE, LATE, Case(4096, 1024, 512, 64, 4, "zipf")], ids=str)
def test_autograd_gives_what_the_operators_give(case: Case, keep_rows: bool, score_mode: str, device: str) -> None:
    """Bitwise, whether the rows of dout are kept or not, and in whichever order."""
    *inputs, ids = *case.tensors(torch.bfloat16, device), case.ids(device)
    x, w1, w2, w3, weights = (t.detach() for t in inputs)
    plan = route_plan(ids, case.experts)
    dout = torch.randn_like(x)
    _, h = ops.moe_forward(x, w1, w2, w3, weights, *plan, score_mode)
    dx, dweights, *dw = backward_by_operators(dout, x, w1, w2, w3, weights, h, *plan, score_mode, keep_rows=keep_rows)
    found = torch.autograd.grad(moe(*inputs[:4], ids, inputs[4], score_mode=score_mode), inputs, dout)
    for a, b in zip(found, (dx, *dw, dweights), strict=True):
        assert torch.equal(a, b)
