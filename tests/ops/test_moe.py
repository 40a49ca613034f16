"""The mixture-of-experts operators against the float64 oracle, and under PyTorch's compiler and autograd."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flashmoe_train import moe
from flashmoe_train.ops.moe import MoECase, fallback, moe_combine, moe_permute, moe_rows, route_plan, supports

from .moe_cases import CASES, Case, oracle, parts_of_backward
from .moe_gpu import exact
from .operators import CountOperators, assert_close_in_norm, assert_opcheck, captured, chooser, forward_backward, saving

ops = torch.ops.flashmoe
NAMES = ("out", "dx", "dw1", "dw2", "dw3", "dweights")


def assert_equals_oracle(case: Case, function, dtype=torch.float32, device: str = "cpu") -> None:
    inputs, ids = case.tensors(dtype, device), case.ids(device)
    wanted_out = oracle(*inputs, ids)
    dout = torch.randn(wanted_out.shape, dtype=torch.float64).to(dtype)
    wanted = wanted_out.detach(), *torch.autograd.grad(wanted_out, inputs, dout.double())
    found = forward_backward(functools.partial(function, ids=ids), inputs, dout.to(device))
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        assert_close_in_norm(name, x if name != "dweights" else x.to(dtype), y)


def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor, ids: Tensor, score_mode: str) -> Tensor:
    return moe(x, w1, w2, w3, ids, weights, score_mode=score_mode)


def run_fallback(x, w1, w2, w3, weights, ids, score_mode) -> Tensor:
    return fallback.moe(x, w1, w2, w3, weights, route_plan(ids, w1.shape[0]), score_mode)


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_oracle(case: Case) -> None:
    assert_equals_oracle(case, functools.partial(run, score_mode=case.score_mode))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_of_the_gpu_tests_equals_oracle(case: Case) -> None:
    inputs, ids = case.tensors(torch.float64), case.ids()
    out = oracle(*inputs, ids)
    dout = torch.randn_like(out)
    wanted = out.detach(), *torch.autograd.grad(out, inputs, dout)
    for name, x, y in zip(NAMES, exact(*inputs, ids, dout), wanted, strict=True):
        assert_close_in_norm(name, x, y)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fallback_equals_oracle(case: Case) -> None:
    function = functools.partial(run_fallback, score_mode=case.score_mode)
    assert_equals_oracle(case, function)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_function_on_gpu_equals_oracle(case: Case) -> None:
    """By the fallback wherever the hidden dim is 12, which the kernels do not take."""
    function = functools.partial(run, score_mode=case.score_mode)
    assert_equals_oracle(case, function, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_fallback_does_not_wait_for_the_gpu() -> None:
    inputs, ids = Case(tokens=64).tensors(torch.bfloat16, "cuda"), Case(tokens=64).ids("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_fallback(*inputs, ids, "combine").square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph_of_the_fallback_replays_another_routing() -> None:
    case = Case(tokens=64)
    x, w1, w2, w3, weights = (t.detach() for t in case.tensors(torch.bfloat16, "cuda"))
    ids = case.ids("cuda")
    graph, (out,) = captured(lambda: (run_fallback(x, w1, w2, w3, weights, ids, "combine"),))
    ids.copy_(Case(tokens=64, routing="skipped").ids("cuda"))
    graph.replay()
    assert_close_in_norm("out", out, oracle(x, w1, w2, w3, weights, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_low_precision(score_mode: str, dtype: torch.dtype) -> None:
    function = functools.partial(run, score_mode=score_mode)
    assert_equals_oracle(Case(tokens=129), function, dtype)


@pytest.mark.parametrize("case", [Case(tokens=5), Case(tokens=5, score_mode="activation", routing="skipped")], ids=str)
def test_gradcheck(case: Case) -> None:
    ids = case.ids()
    function = functools.partial(run, ids=ids, score_mode=case.score_mode)
    assert torch.autograd.gradcheck(function, case.tensors(torch.float64))


def test_random_cases() -> None:
    pick = chooser(seed=1)
    for _ in range(60):
        experts = pick(1, 2, 7, 16)
        case = Case(
            tokens=pick(0, 1, 2, 17, 64, 65),
            dim=pick(1, 8, 20),
            hidden=pick(1, 8, 20),
            experts=experts,
            top_k=min(experts, pick(1, 2, 4)),
            routing=pick("random", "one", "even", "skipped", "duplicate"),
            score_mode=pick("combine", "activation"),
        )
        assert_equals_oracle(case, functools.partial(run, score_mode=case.score_mode))


def test_nan_stays_with_its_token() -> None:
    case = Case(experts=8)
    ids = case.ids()
    results = []
    for poison in (False, True):
        torch.manual_seed(3)
        inputs = case.tensors()
        if poison:
            inputs[0].data[4] = torch.nan
        results.append(
            forward_backward(functools.partial(run, ids=ids, score_mode="combine"), inputs, torch.ones(23, 16))
        )
    clean, poisoned = results
    others = torch.arange(23) != 4
    for name, x, y in zip(NAMES, poisoned, clean, strict=True):
        if name.startswith("dw") and name != "dweights":
            untouched = torch.ones(8, dtype=torch.bool)
            untouched[ids[4].long()] = False
            assert x[~untouched].isnan().any()
            torch.testing.assert_close(x[untouched], y[untouched])
        else:
            torch.testing.assert_close(x[others], y[others])


def test_nan_weight_of_a_skipped_slot_is_never_used() -> None:
    x, w1, w2, w3, weights = Case().tensors()
    ids = Case().ids()
    ids[3, 1] = -1
    weights.data[3, 1] = torch.nan
    for score_mode in ("combine", "activation"):
        out = moe(x, w1, w2, w3, ids, weights, score_mode=score_mode)
        grads = torch.autograd.grad(out.sum(), (x, w1, w2, w3, weights))
        assert all(t.isfinite().all() for t in (out, *grads))


def test_repeats_bitwise() -> None:
    case = Case(tokens=129)
    inputs, ids, dout = case.tensors(torch.bfloat16), case.ids(), torch.randn(129, 16).bfloat16()
    function = functools.partial(run, ids=ids, score_mode="combine")
    first = forward_backward(function, inputs, dout)
    for x, y in zip(first, forward_backward(function, inputs, dout), strict=True):
        assert torch.equal(x, y)


# ---------------------------------------------------------------------------------------------------- plan, rows, parts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_route_plan(case: Case) -> None:
    ids = case.ids()
    offsets, row_slot, slot_row = route_plan(ids, case.experts)
    flat = ids.flatten().tolist()
    wanted = [slot for e in range(case.experts) for slot, expert in enumerate(flat) if expert == e]
    assert row_slot.tolist() == wanted + [-1] * (len(flat) - len(wanted))
    assert [b - a for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)] == [
        flat.count(e) for e in range(case.experts)
    ]
    rows = {slot: row for row, slot in enumerate(wanted)}
    assert slot_row.flatten().tolist() == [rows.get(slot, -1) for slot in range(len(flat))]
    assert {t.dtype for t in (offsets, row_slot, slot_row)} == {torch.int32}


@pytest.mark.parametrize("weighted", [False, True])
def test_permute_and_combine_gradients(weighted: bool) -> None:
    case = Case(routing="skipped", tokens=6)
    plan = route_plan(case.ids(), case.experts)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, plan.row_slot, plan.slot_row), (x,))
    if weighted:
        assert torch.autograd.gradcheck(lambda rows, w: moe_combine(rows, plan.slot_row, w), (rows, weights))
    else:
        assert torch.autograd.gradcheck(lambda rows: moe_combine(rows, plan.slot_row, None), (rows,))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("function", [moe_rows, fallback.moe_rows])
def test_rows_equal_tokens(weighted: bool, function) -> None:
    """Permuting outside and running the experts on rows is the same function; rows behind the offsets are zero."""
    case = Case(routing="skipped")
    x, w1, w2, w3, weights = case.tensors()
    ids = case.ids()
    plan = route_plan(ids, case.experts)
    row_weights = moe_permute(weights.reshape(-1, 1), plan.row_slot, plan.slot_row.reshape(-1, 1)).squeeze(1)
    rows = moe_permute(x, plan.row_slot, plan.slot_row)
    rows.data[plan.offsets[-1] :] = torch.nan
    y = function(rows, w1, w2, w3, plan.offsets, row_weights if weighted else None)
    assert (y[plan.offsets[-1] :] == 0).all()
    out = moe_combine(y, plan.slot_row, None if weighted else weights)
    wanted = moe(x, w1, w2, w3, ids, weights, score_mode="activation" if weighted else "combine")
    torch.testing.assert_close(out, wanted)
    dout = torch.randn_like(out)
    inputs = (x, w1, w2, w3, weights)
    for a, b in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(wanted, inputs, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- as an operator


def forward_arguments(case: Case, rows: bool = False) -> tuple:
    x, w1, w2, w3, weights = case.tensors()
    plan = route_plan(case.ids(), case.experts)
    if rows:
        x = moe_permute(x.detach(), plan.row_slot, plan.slot_row).requires_grad_()
        return x, w1, w2, w3, None, plan.offsets, None, None, "activation"
    return x, w1, w2, w3, weights, *plan, case.score_mode


OPERATOR_CASES = [(Case(), False), (Case(routing="skipped", score_mode="activation"), False), (Case(), True)]


@pytest.mark.parametrize("case, rows", OPERATOR_CASES, ids=str)
def test_opcheck_experts(case: Case, rows: bool) -> None:
    arguments = forward_arguments(case, rows)
    assert_opcheck(ops.moe_forward.default, arguments)
    for name, given in parts_of_backward(arguments, torch.randn(arguments[0].shape)).items():
        assert_opcheck(getattr(ops, name).default, given)


def test_opcheck_plan() -> None:
    case = Case(routing="skipped")
    assert_opcheck(ops.route_plan.default, (case.ids(), case.experts))


def test_compiles_once_for_all_lengths_and_routings() -> None:
    def function(x, w1, w2, w3, weights, ids):
        return moe(x.sin(), w1, w2, w3, ids, weights).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, routing in ((17, "random"), (33, "one"), (64, "skipped")):
            case = Case(tokens=tokens, routing=routing)
            inputs, ids, dout = case.tensors(), case.ids(), torch.randn(tokens, 16)
            found = forward_backward(functools.partial(compiled, ids=ids), inputs, dout)
            wanted = forward_backward(functools.partial(function, ids=ids), inputs, dout)
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_selective_checkpointing_does_not_recompute() -> None:
    case = Case()
    inputs, ids = case.tensors(), case.ids()
    block = functools.partial(run, ids=ids, score_mode="combine")
    wanted = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    context = saving(ops.moe_forward.default, ops.route_plan.default)
    with CountOperators() as counter:
        out = checkpoint(block, *inputs, use_reentrant=False, context_fn=context)
        found = torch.autograd.grad(out.square().sum(), inputs)
    assert (counter.counts["moe_forward"], counter.counts["moe_down_backward"], counter.counts["route_plan"]) == (
        1,
        1,
        1,
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_saves_inputs_h_and_maps_only() -> None:
    case = Case()
    saved: list[tuple[tuple[int, ...], torch.dtype]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.append((tuple(x.shape), x.dtype)), x)[1], lambda x: x
    ):
        run(*case.tensors(torch.bfloat16), case.ids(), "combine")
    b, f, i = torch.bfloat16, torch.float32, torch.int32
    assert saved == [
        ((23, 16), b),
        ((5, 12, 16), b),
        ((5, 16, 12), b),
        ((5, 12, 16), b),
        ((23, 2), f),
        ((6,), i),
        ((46,), i),
        ((23, 2), i),
        ((46, 24), b),
    ]


def test_flops() -> None:
    case = Case()
    with FlopCounterMode(display=False) as counter:
        run(*case.tensors(), case.ids(), "combine").sum().backward()
    assert counter.get_total_flops() == 18 * 23 * 2 * 12 * 16


# --------------------------------------------------------------------------------------------------------- wrong input

X, W1, W2, W3, WEIGHTS = (t.detach() for t in Case().tensors())
IDS = Case().ids()


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"x": X[None]}, ValueError, "x must have 2 dimensions"),
        ({"x": X.int()}, TypeError, "x must be floating point"),
        ({"x": X.t().contiguous().t()}, ValueError, "x must have a contiguous last dimension"),
        ({"w1": W1[0]}, ValueError, r"w1 must be \[experts, hidden dim, model dim\]"),
        ({"w2": W1}, ValueError, r"w2 must be \[5, 16, 12\], found \[5, 12, 16\]"),
        ({"w3": W3[:4]}, ValueError, r"w3 must be \[5, 12, 16\]"),
        ({"w3": W3.bfloat16()}, TypeError, "w3 must have x's dtype torch.float32, found torch.bfloat16"),
        ({"w2": W2.to("meta")}, ValueError, "w2 must be on x's device"),
        ({"w2": W2.transpose(1, 2).contiguous().transpose(1, 2)}, ValueError, "w2 must have a contiguous last"),
        ({"w1": W1[:0]}, ValueError, "w1 must be .* of at least one expert, found"),
        ({"ids": IDS[:, 0]}, ValueError, r"ids must be \[tokens, experts per token\] = \[23, ...\], found \[23\]"),
        ({"ids": IDS[:, :0]}, ValueError, r"ids must be \[tokens, experts per token\]"),
        ({"ids": IDS.to("meta")}, ValueError, "ids must be on x's device cpu, found meta"),
        ({"ids": IDS.float()}, TypeError, "ids must be int32 or int64, found torch.float32"),
        ({"ids": IDS[:5], "weights": WEIGHTS[:5]}, ValueError, r"ids must be .* = \[23, ...\], found \[5, 2\]"),
        ({"weights": WEIGHTS[:, :1]}, ValueError, r"weights must be \[23, 2\], found \[23, 1\]"),
        (
            {"weights": WEIGHTS.bfloat16()},
            TypeError,
            "weights must be torch.float32 beside torch.float32, found torch.bfloat16",
        ),
        ({"weights": WEIGHTS.double()}, TypeError, "weights must be torch.float32 beside torch.float32"),
        ({"score_mode": "before"}, ValueError, "score_mode must be one of"),
    ],
)
@pytest.mark.parametrize("function", ["operator", "fallback"])
def test_wrong_argument(changes: dict, error: type[Exception], text: str, function: str, monkeypatch) -> None:
    if function == "fallback":
        monkeypatch.setattr("flashmoe_train.ops.moe.supports", lambda case: "not here")
    with pytest.raises(error, match=text):
        moe(**{"x": X, "w1": W1, "w2": W2, "w3": W3, "ids": IDS, "weights": WEIGHTS, **changes})


@pytest.mark.parametrize(
    "offsets, weights, error, text",
    [
        (torch.zeros(6), None, TypeError, "offsets must be int32"),
        (torch.zeros(5, dtype=torch.int32), None, ValueError, r"offsets must be \[experts \+ 1\] = \[6\]"),
        (
            torch.tensor([0, 3, 2, 4, 5, 6], dtype=torch.int32),
            None,
            ValueError,
            "offsets must start at 0, not decrease",
        ),
        (torch.tensor([0, 3, 3, 4, 5, 99], dtype=torch.int32), None, ValueError, "end within the 23 rows"),
        (torch.zeros(6, dtype=torch.int32), torch.ones(3), ValueError, r"weights must be \[23\]"),
    ],
)
def test_wrong_rows_argument(offsets: Tensor, weights: Tensor | None, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        moe_rows(X, W1, W2, W3, offsets, weights)


def test_wrong_part_argument() -> None:
    plan = route_plan(IDS, 5)
    with pytest.raises(ValueError, match="num_experts must be at least 1, found 0"):
        route_plan(IDS, 0)
    with pytest.raises(TypeError, match="row_slot must be int32"):
        moe_permute(X, plan.row_slot.long(), plan.slot_row)
    with pytest.raises(ValueError, match="slot_row must have 2 dimensions"):
        moe_combine(X, plan.slot_row[0], None)
    with pytest.raises(ValueError, match="row_slot and slot_row must be given together"):
        ops.moe_forward(X, W1, W2, W3, None, plan.offsets, plan.row_slot, None, "combine")
    with pytest.raises(ValueError, match="score_mode must be 'activation'"):
        ops.moe_forward(X, W1, W2, W3, torch.ones(23), plan.offsets, None, None, "combine")


def test_supports_names_the_reason() -> None:
    def reason(**changes: object) -> str:
        case = MoECase("cuda", "9.0", torch.bfloat16, 64, 32, 8)._replace(**changes)
        return str(supports(case, complete=True))

    assert reason() == reason(dtype=torch.float16) == "None"
    assert reason(device_type="cpu", dtype=torch.float64, dim=7) == "None"
    assert "no compiled mixture-of-experts kernel" in reason(device_type="xpu")
    assert "compute capability 9.0 (Hopper), found 8.0" in reason(capability="8.0")
    assert "torch.bfloat16 and torch.float16, found torch.float32" in reason(dtype=torch.float32)
    assert "a model dim that is a multiple of 8, found 60" in reason(dim=60)
    assert "a hidden dim that is a multiple of 8, found 12" in reason(hidden_dim=12)
    assert "at most 4096 experts, found 4097" in reason(experts=4097)
