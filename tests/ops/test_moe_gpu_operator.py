"""The experts' CUDA kernels among other tensors, streams, graphs and compilers."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from flashmoe_train import moe
from flashmoe_train.bench import moe as bench
from flashmoe_train.bench.measure import free, relative_error
from flashmoe_train.bench.moe_cases import SHAPES
from flashmoe_train.bench.moe_cases import Case as BenchCase
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.nn import MoE
from flashmoe_train.ops.moe import moe_rows, route_plan

from .moe_cases import BACKWARD, Case, backward_by_operators, parts_of_backward
from .moe_gpu import DTYPES, Rows, assert_right, by_operators, exact, kernel, kernel_rows, results
from .operators import (
    ON_HOPPER,
    CountOperators,
    assert_opcheck,
    captured,
    forward_backward,
    inside,
    saving,
)

ops = torch.ops.flashmoe
pytestmark = ON_HOPPER
CASE = Case(130, dim=136, hidden=72)
SKIPPED = replace(CASE, routing="skipped", score_mode="activation")


def inputs_of(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(x, w1, w2, w3, weights), ids, dout."""
    dout = torch.randn(case.tokens, case.dim, device="cuda").to(dtype)
    return case.tensors(dtype, "cuda"), case.ids("cuda"), dout


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(x, y), f"result {i}"


# ------------------------------------------------------------------------------------------------ memory and neighbours


def everything(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "every other row": lambda t, d: inside((2 * t, d), (slice(None, None, 2),)),
    "middle of more rows": lambda t, d: inside((t + 9, d), (slice(5, 5 + t),)),
    "of wider rows": lambda t, d: inside((t, d + 8), (..., slice(8, None))),
    "of wider rows, misaligned": lambda t, d: inside((t, d + 1), (..., slice(1, None))),
    "odd strides": lambda t, d: inside((t, d + 3), (..., slice(None, d))),
    "odd address": lambda t, d: inside((t * d + 1,), (slice(1, None),)).view(t, d),
    "one row for all": lambda t, d: everything(1, d).expand(t, d),
}


@pytest.mark.parametrize("dim, keep_rows", [(SKIPPED.dim, False), (SKIPPED.dim, True), (648, False)])
@pytest.mark.parametrize("sorted_rows", [False, True])
@pytest.mark.parametrize("view", MATRICES)
def test_views_of_tokens(view: str, sorted_rows: bool, dim: int, keep_rows: bool) -> None:
    """Bitwise what contiguous copies give: of x, of dout and of h."""
    (_, w1, w2, w3, weights), ids, _ = inputs_of(replace(SKIPPED, dim=dim))
    plan = route_plan(ids, SKIPPED.experts)
    x, dout = (MATRICES[view](SKIPPED.tokens, dim) for _ in range(2))
    rows = SKIPPED.tokens if sorted_rows else SKIPPED.tokens * SKIPPED.top_k
    h = MATRICES[view](rows, 2 * SKIPPED.hidden)
    if sorted_rows:
        offsets = torch.tensor((0, 20, 20, 90, 91, 120), dtype=torch.int32, device="cuda")
        rest = weights.detach()[:, 0], h, offsets, None, None, "activation"
    else:
        rest = weights.detach(), h, *plan, "activation"

    def run(x: Tensor, dout: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        row_weights, _, *plan = rest
        out, _ = ops.moe_forward(x, w1.detach(), w2.detach(), w3.detach(), row_weights, *plan)
        w = (t.detach() for t in (w1, w2, w3))
        return out, *backward_by_operators(dout, x, *w, row_weights, h, *plan, keep_rows=keep_rows)

    copies = (t.clone(memory_format=torch.contiguous_format) for t in (x, dout, h))
    assert_same(run(x, dout, h), run(*copies))


def test_tokens_far_apart() -> None:
    """More than 2^31 elements, and 2^32 bytes, from the first to the last."""
    case = replace(SKIPPED, tokens=2100)
    inputs, ids, _ = inputs_of(case)
    x, dout = torch.empty(2100, 2**20, device="cuda", dtype=torch.bfloat16)[:, : 2 * case.dim].normal_().chunk(2, 1)
    assert x.storage_offset() == 0 and x.stride(0) * (case.tokens - 1) > 2**31
    weights, plan = tuple(t.detach() for t in inputs[1:]), route_plan(ids, case.experts)
    found, wanted = (
        by_operators((x, *weights), plan, case.score_mode, dout)
        for x, dout in ((x, dout), (x.contiguous(), dout.contiguous()))
    )
    assert_same((found[0], *found[2:]), (wanted[0], *wanted[2:]))  # h holds what nobody wrote


WEIGHTS: dict[str, Callable[[int, int, int], Tensor]] = {
    "middle of more experts": lambda e, n, d: inside((e + 3, n, d), (slice(2, 2 + e),)),
    "every other expert": lambda e, n, d: inside((2 * e, n, d), (slice(1, None, 2),)),
    "of gate and up in one": lambda e, n, d: inside((e, 2 * n, d), (slice(None), slice(n, None))),
    "every other row": lambda e, n, d: inside((e, 2 * n, d), (slice(None), slice(None, None, 2))),
    "of wider rows": lambda e, n, d: inside((e, n, d + 8), (..., slice(8, None))),
    "experts in the middle": lambda e, n, d: everything(n, e, d).transpose(0, 1),
    "of wider rows, misaligned": lambda e, n, d: inside((e, n, d + 1), (..., slice(1, None))),
    "odd strides": lambda e, n, d: inside((e, n, d + 3), (..., slice(None, d))),
    "odd address": lambda e, n, d: inside((e * n * d + 1,), (slice(1, None),)).view(e, n, d),
    "one expert for all": lambda e, n, d: everything(1, n, d).expand(e, n, d),
    "one row for all": lambda e, n, d: everything(e, 1, d).expand(e, n, d),
}


@pytest.mark.parametrize("view", WEIGHTS)
@pytest.mark.parametrize("name", ["w1", "w2", "w3", "all"])
def test_views_of_weights(name: str, view: str) -> None:
    """Bitwise what contiguous copies give, and no gradient of it is lost."""
    inputs, ids, dout = inputs_of(SKIPPED)
    changed = list(inputs)
    for i, of in enumerate(("w1", "w2", "w3"), 1):
        if name in (of, "all"):
            changed[i] = WEIGHTS[view](*inputs[i].shape).detach().requires_grad_()
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in changed]
    function = kernel(SKIPPED, ids)
    assert_same(results(function, changed, dout), results(function, copies, dout))


def test_views_of_maps_and_weights() -> None:
    """ids in int64 too."""
    inputs, ids, dout = inputs_of(SKIPPED)
    wanted = results(kernel(SKIPPED, ids), inputs, dout)
    weights = inputs[4].detach().t().contiguous().t().requires_grad_()
    apart = ids.repeat_interleave(2, 1)[:, ::2]
    assert not weights.is_contiguous() and not apart.is_contiguous()
    for strange in (apart, ids.t().contiguous().t(), ids.long()):
        assert_same(results(kernel(SKIPPED, strange), (*inputs[:4], weights), dout), wanted)
    arguments = [t.detach() for t in inputs[:4]], route_plan(ids, SKIPPED.experts)
    plain = by_operators((*arguments[0], inputs[4].detach()), arguments[1], "activation", dout)
    plan = [torch.stack((t, t), -1)[..., 0] for t in arguments[1]]
    assert not any(t.is_contiguous() for t in plan)
    found = by_operators((*arguments[0], weights.detach()), plan, "activation", dout)
    assert_same((found[0], *found[2:]), (plain[0], *plain[2:]))  # h holds what nobody wrote


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_transposed_weights_are_refused(name: str) -> None:
    (x, w1, w2, w3, weights), ids, _ = inputs_of(CASE)
    given = {"w1": w1, "w2": w2, "w3": w3}
    given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=f"{name} must have a contiguous last dimension"):
        moe(x, **given, ids=ids, weights=weights)


@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_saves_inputs_maps_and_h_only(score_mode: str) -> None:
    case = replace(CASE, score_mode=score_mode)
    inputs, ids, _ = inputs_of(case)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        kernel(case, ids)(*inputs)
    assert [x.data_ptr() for x in saved[:5]] == [x.data_ptr() for x in inputs]
    rows = case.tokens * case.top_k
    shapes = [(case.experts + 1,), (rows,), (case.tokens, case.top_k), (rows, 2 * case.hidden)]
    assert [tuple(x.shape) for x in saved[5:]] == shapes
    assert [x.dtype for x in saved[5:]] == [torch.int32] * 3 + [torch.bfloat16]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in saved[5:])  # no part of something larger


def test_saves_rows_and_h_only() -> None:
    rows = Rows.of((70, 0, 60), 5, 136, 72, torch.bfloat16, "cuda")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        kernel_rows(rows.offsets)(*rows.inputs)
    assert [x.data_ptr() for x in saved[:-1]] == [x.data_ptr() for x in (*rows.inputs, rows.offsets)]
    assert tuple(saved[-1].shape) == (135, 144)


@pytest.mark.parametrize("shape", ["OLMoE", "Qwen3-30B", "fine 256"])
def test_peak_memory(shape: str) -> None:
    """Forward and backward need at most 0.8 of what PyTorch's compiled grouped products do, beside their inputs. Where
    experts are few and large their gradients alone are more."""
    (of_both,) = (b for b in bench.BENCHES if b.name == "moe_forward_backward")
    device = torch.device("cuda")
    problem = of_both.prepare(BenchCase(shape, *SHAPES[shape]), device)
    stopwatch, peak = Stopwatch(device), {}
    for name in ("flashmoe", "compiled"):
        run = problem.contenders[name]()
        run()  # compiles
        free()
        peak[name] = stopwatch.peak_gib(run)
    assert peak["flashmoe"] <= 0.8 * peak["compiled"], peak


# ---------------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        SKIPPED,
        replace(CASE, routing="one", experts=16),
        replace(CASE, routing="nobody"),
        Case(700, 264, 328, 64, 8, "zipf"),
        Case(5, 8, 8, 512, 8),
    ],
    ids=str,
)
def test_writes_all_of_its_results(case: Case, dtype: torch.dtype) -> None:
    """A replayed CUDA graph writes where the capture did: whatever it leaves there is the NaN from before. Of h it may
    leave nobody's rows, so that backward in the same graph finds NaN in them."""
    inputs, ids, dout = inputs_of(case, dtype)
    inputs = tuple(x.detach() for x in inputs)
    plan = route_plan(ids, case.experts)
    used = int(plan.offsets[-1])
    run = functools.partial(by_operators, inputs, plan, case.score_mode, dout)
    wanted = [x.clone() for x in run()]
    graph, found = captured(run)
    for x in found:
        x.fill_(torch.nan)
    graph.replay()
    for name, x, y in zip(("out", "h", "dx", "dweights", "dw1", "dw2", "dw3"), found, wanted, strict=True):
        x, y = (x[:used], y[:used]) if name == "h" else (x, y)
        assert torch.equal(x, y), f"{name}: {int(x.isnan().sum())} of {x.numel()} numbers not written"


@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_cuda_graph_replays_another_routing(score_mode: str) -> None:
    case = Case(200, 136, 72, experts=16, top_k=4, score_mode=score_mode)
    inputs, ids, dout = inputs_of(case)
    graph, found = captured(lambda: forward_backward(kernel(case, ids), inputs, dout))
    for routing in ("random", "one", "skipped", "zipf", "nobody", "duplicate", "random"):
        case = replace(case, routing=routing)
        ids.copy_(case.ids("cuda"))
        for x in (inputs[0].data, inputs[4].data, dout):
            x.normal_()
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        assert_right(routing, found, exact(*inputs, ids, dout))


def test_cuda_graph_of_rows_replays_with_other_offsets() -> None:
    rows = Rows.of((70, 0, 60, 30), 40, 136, 72, torch.bfloat16, "cuda")
    graph, found = captured(lambda: forward_backward(kernel_rows(rows.offsets), rows.inputs, rows.dout))
    for counts in ((1, 2, 3, 4), (0, 0, 0, 200), (0, 0, 0, 0), (65, 0, 64, 1)):
        other = Rows.of(counts, 200 - sum(counts), 136, 72, torch.bfloat16, "cuda")
        buffers = *rows.inputs, rows.dout, rows.offsets
        for x, y in zip(buffers, (*other.inputs, other.dout, other.offsets), strict=True):
            x.data.copy_(y)
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        assert_right(str(counts), found, other.exact(weighted=True))


# ----------------------------------------------------------------------------------------------------------- as a guest


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", [CASE, SKIPPED], ids=str)
def test_second_gpu(case: Case) -> None:
    """Tensors on a GPU that is not the current one, which stays the current one."""
    assert torch.cuda.current_device() == 0
    inputs, ids = case.tensors(torch.bfloat16, "cuda:1"), case.ids("cuda:1")
    dout = torch.randn(case.tokens, case.dim, device="cuda:1").bfloat16()
    assert_right("", results(kernel(case, ids), inputs, dout), exact(*inputs, ids, dout))
    rows = Rows.of((70, 0, 60), 5, 136, 72, torch.bfloat16, "cuda:1")
    assert_right("rows", results(kernel_rows(rows.offsets), rows.inputs, rows.dout), rows.exact(weighted=True))
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "position, name", enumerate(("x", "w1", "w2", "w3", "weights", "offsets", "row_slot", "slot_row"))
)
def test_tensors_of_two_gpus_are_refused(position: int, name: str) -> None:
    arguments = forward_arguments()
    arguments[position] = arguments[position].to("cuda:1")
    with pytest.raises(RuntimeError, match="must be on CUDA device"):
        ops.moe_forward(*arguments)


@pytest.mark.parametrize("case", [CASE, SKIPPED], ids=str)
def test_runs_on_the_current_stream(case: Case) -> None:
    """On any other it would not wait for its inputs."""
    inputs, ids, dout = inputs_of(case)
    real = (*(x.detach() for x in inputs), dout)
    run = functools.partial(results, kernel(case, ids))
    wanted = run(inputs, dout)
    late = [torch.full_like(x, torch.nan) for x in real]
    late_ids = torch.full_like(ids, -1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip((*late, late_ids), (*real, ids), strict=True):
            x.copy_(y)
        leaves = tuple(x.requires_grad_() for x in late[:5])
        found = results(kernel(case, late_ids), leaves, late[5])
    torch.cuda.synchronize()
    assert_same(found, wanted)


@pytest.mark.parametrize("view", ["contiguous", *MATRICES])
@pytest.mark.parametrize("case", [CASE, SKIPPED], ids=str)
def test_does_not_wait_for_the_gpu(case: Case, view: str) -> None:
    (x, *inputs), ids, dout = inputs_of(case)
    if view != "contiguous":
        x = MATRICES[view](case.tokens, case.dim).detach().requires_grad_()
    rows = Rows.of((70, 0, 60), 5, 136, 72, torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(kernel(case, ids), (x, *inputs), dout)
        for given in (rows.inputs, rows.inputs[:4]):
            results(kernel_rows(rows.offsets), given, rows.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------- as an operator


@pytest.mark.parametrize(
    "case", [Case(23, 16, 24), Case(23, 16, 24, routing="duplicate", score_mode="activation")], ids=str
)
def test_opcheck(case: Case) -> None:
    """Of routings that use all rows: results are compared, and nobody's rows of h hold anything."""
    (x, *inputs), ids, _ = inputs_of(case)
    arguments = (x, *inputs, *route_plan(ids, case.experts), case.score_mode)
    assert_opcheck(ops.moe_forward.default, arguments)
    for name, given in parts_of_backward(arguments, torch.randn_like(x)).items():
        assert_opcheck(getattr(ops, name).default, given)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_rows(weighted: bool) -> None:
    rows = Rows.of((9, 0, 14), 0, 16, 24, torch.bfloat16, "cuda")
    *inputs, weights = rows.inputs
    arguments = (*inputs, weights if weighted else None, rows.offsets, None, None, "activation")
    assert_opcheck(ops.moe_forward.default, arguments)
    for name, given in parts_of_backward(arguments, torch.randn_like(inputs[0])).items():
        assert_opcheck(getattr(ops, name).default, given)


def test_opcheck_of_backward_with_rows_of_nobody() -> None:
    """Of what has results that are all written."""
    inputs, ids, dout = inputs_of(Case(23, 16, 24, routing="skipped"))
    h = torch.randn(46, 48, device="cuda").bfloat16()
    parts = parts_of_backward((*inputs, *route_plan(ids, 5), "combine"), dout, h)
    del parts["moe_down_backward"]
    for name, given in parts.items():
        assert_opcheck(getattr(ops, name).default, given)


@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_compiles_once_for_all_lengths_and_routings(score_mode: str) -> None:
    def function(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return moe(x * 2, w1, w2, w3, ids, weights, score_mode=score_mode) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, routing in ((17, "random"), (133, "one"), (300, "skipped"), (64, "zipf"), (2, "nobody")):
            inputs, ids, dout = inputs_of(replace(CASE, tokens=tokens, routing=routing))
            found, wanted = (results(functools.partial(f, ids=ids), inputs, dout) for f in (compiled, function))
            assert_same(found, wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_once_for_all_numbers_of_rows(weighted: bool) -> None:
    def function(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *weights: Tensor, offsets: Tensor) -> Tensor:
        return moe_rows(rows * 2, w1, w2, w3, offsets, *weights) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ((3, 4, 5), (0, 200, 0), (64, 65, 2)):
            rows = Rows.of(counts, 7, 136, 72, torch.bfloat16, "cuda")
            inputs = rows.inputs if weighted else rows.inputs[:4]
            found, wanted = (
                results(functools.partial(f, offsets=rows.offsets), inputs, rows.dout) for f in (compiled, function)
            )
            assert_same(found, wanted)


def test_compiled_code_calls_the_operator() -> None:
    inputs, ids, _ = inputs_of(CASE)
    recorder = EagerAndRecordGraphs()
    torch.compile(kernel(CASE, ids), fullgraph=True, backend=recorder)(*inputs)
    (graph,) = recorder.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("flashmoe.moe_forward" in target for target in called), called


def test_selective_checkpointing_does_not_recompute() -> None:
    inputs, ids, dout = inputs_of(CASE)

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return kernel(CASE, ids)(x.sin(), *rest)

    def checkpointed(*inputs: Tensor) -> Tensor:
        context = saving(ops.moe_forward.default, ops.route_plan.default)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=context)

    wanted = forward_backward(block, inputs, dout)
    with CountOperators() as counter:
        found = forward_backward(checkpointed, inputs, dout)
    assert counter.counts == dict.fromkeys(("route_plan", "moe_forward", *BACKWARD), 1)
    assert_same(found, wanted)


def test_gradients_have_no_gradient() -> None:
    inputs, ids, _ = inputs_of(CASE)
    (dx,) = torch.autograd.grad(kernel(CASE, ids)(*inputs).float().square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="flashmoe::moe_up_backward has no gradient"):
        dx.sum().backward()


# ---------------------------------------------------------------------------------------------------------- as a module


def norm_errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [relative_error(x.cpu().double(), y.double()) for x, y in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_module_in_bfloat16(score_mode: str) -> None:
    """The gradients of all parameters and of x, as in float32 on the CPU from the same numbers."""
    module = MoE(136, 72, experts=8, top_k=2, score_mode=score_mode, device="cuda", dtype=torch.bfloat16)
    reference = copy.deepcopy(module).cpu().float()
    x, dout = (torch.randn(2, 65, 136, device="cuda").bfloat16() for _ in range(2))

    def step(module: MoE, x: Tensor, dout: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), dout)]

    with CountOperators() as counter:
        found = step(module, x, dout)
    assert counter.counts["moe_forward"] == counter.counts["moe_down_backward"] == 1
    wanted = step(reference, x.detach().cpu().float(), dout.cpu().float())
    assert max(norm_errors(found, wanted)) <= 3e-2


def test_module_trains_under_autocast() -> None:
    """Three steps with parameters in float32 change them as on the CPU, and the loss falls as it does there."""
    module = MoE(136, 72, experts=8, top_k=2, renormalize=True).cuda()
    reference = copy.deepcopy(module).cpu()
    x, target = torch.randn(2, 65, 136), torch.randn(2, 65, 136)

    def train(module: MoE, device: str) -> tuple[list[float], list[Tensor]]:
        before = [p.detach().clone() for p in module.parameters()]
        optimizer, losses = torch.optim.SGD(module.parameters(), lr=1.0), []
        for _ in range(3):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                out = module(x.to(device))
            loss = (out.float() - target.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [p.detach() - q for p, q in zip(module.parameters(), before, strict=True)]

    with CountOperators() as counter:
        losses, changes = train(module, "cuda")
    assert counter.counts["moe_forward"] == counter.counts["moe_down_backward"] == 3
    wanted_losses, wanted_changes = train(reference, "cpu")
    assert losses == pytest.approx(wanted_losses, rel=1e-3) and losses[0] > losses[1] > losses[2]
    assert max(norm_errors(changes, wanted_changes)) <= 5e-2


# ---------------------------------------------------------------------------------------------------------- wrong input

ARGUMENTS = ("x", "w1", "w2", "w3", "weights", "offsets", "row_slot", "slot_row", "score_mode")
WRONG = Case(23, 16, 24)  # T, d, n; E = 5, K = 2


def forward_arguments() -> list:
    inputs, ids, _ = inputs_of(WRONG)
    return [*(x.detach() for x in inputs), *route_plan(ids, WRONG.experts), "combine"]


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"w2": lambda w: w.transpose(1, 2)}, ValueError, r"w2 must be \[5, 16, 24\], found \[5, 24, 16\]"),
        ({"w3": lambda w: w.half()}, TypeError, "w3 must have x's dtype torch.bfloat16, found torch.float16"),
        ({"w2": lambda w: w.cpu()}, ValueError, "w2 must be on x's device cuda:0, found cpu"),
        ({"weights": lambda w: w[:, :1]}, ValueError, r"weights must be \[23, 2\], found \[23, 1\]"),
        ({"weights": lambda w: w.bfloat16()}, TypeError, "weights must be torch.float32 beside torch.bfloat16"),
        ({"score_mode": lambda x: "before"}, ValueError, "score_mode must be one of"),
    ],
)
def test_public_function_raises_as_on_the_cpu(changes: dict[str, Callable], error: type[Exception], text: str) -> None:
    given = dict(zip(ARGUMENTS, forward_arguments(), strict=True))
    names = "x", "w1", "w2", "w3", "weights", "score_mode"
    wrong = {name: changes[name](given[name]) if name in changes else given[name] for name in names}
    with pytest.raises(error, match=text):
        moe(**wrong, ids=WRONG.ids("cuda"))


def test_moe_rows_raises_as_on_the_cpu() -> None:
    x, w1, w2, w3, _, offsets, *_ = forward_arguments()
    with pytest.raises(ValueError, match=r"weights must be \[23\], found \[3\]"):
        moe_rows(x, w1, w2, w3, offsets, torch.ones(3, device="cuda"))
    with pytest.raises(TypeError, match=r"offsets must be int32, found torch.int64"):
        moe_rows(x, w1, w2, w3, offsets.long())


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


WRONG_ARGUMENTS: list[tuple[dict[str, Callable], str]] = [
    ({"x": lambda x: x.cpu()}, "x must be on a CUDA device"),
    ({"x": lambda x: x[None]}, r"x must have 2 dimensions, found \[1, 23, 16\]"),
    ({"x": lambda x: x.float()}, "x must be bfloat16 or float16 for the compiled kernels, found Float"),
    ({"x": lambda x: x.int()}, "x must be bfloat16, float16, float32 or float64, found Int"),
    ({"x": transposed}, "x must have a contiguous last dimension, found stride 23"),
    ({"x": lambda x: x[:, :8]}, r"w1 must be \[5, 24, 8\], found \[5, 24, 16\]"),
    ({"x": lambda x: x[:, :12]}, "a model dim and a hidden dim that are multiples of 8, found 12 and 24"),
    ({"x": lambda x: x[:, :0]}, "a model dim and a hidden dim that are multiples of 8, found 0 and 24"),
    ({"x": lambda x: x[:7]}, r"slot_row must have a row per token of x, found \[23, 2\] and \[7, 16\]"),
    ({"w1": lambda w: w[0]}, r"w1 must be \[experts, hidden dim, model dim\], found \[24, 16\]"),
    ({"w1": lambda w: w[:0]}, "take 1 to 4096 experts, found 0"),
    ({"w1": lambda w: w[:1].expand(4097, 24, 16)}, "take 1 to 4096 experts, found 4097"),
    ({"w1": lambda w: w[:, :20]}, "a model dim and a hidden dim that are multiples of 8, found 16 and 20"),
    ({"w1": lambda w: w[:, :8]}, r"w2 must be \[5, 16, 8\], found \[5, 16, 24\]"),
    ({"w1": lambda w: w[..., :8]}, r"w1 must be \[5, 24, 16\], found \[5, 24, 8\]"),
    ({"w1": lambda w: w.half()}, "w1 must have x's dtype BFloat16, found Half"),
    ({"w1": lambda w: w.cpu()}, "w1 must be on CUDA device 0"),
    ({"w1": transposed}, "w1 must have a contiguous last dimension"),
    ({"w2": lambda w: w[:4]}, r"w2 must be \[5, 16, 24\], found \[4, 16, 24\]"),
    ({"w2": lambda w: w.transpose(1, 2)}, r"w2 must be \[5, 16, 24\], found \[5, 24, 16\]"),
    ({"w2": lambda w: w.float()}, "w2 must have x's dtype BFloat16, found Float"),
    ({"w2": lambda w: w.cpu()}, "w2 must be on CUDA device 0"),
    ({"w2": transposed}, "w2 must have a contiguous last dimension"),
    ({"w3": lambda w: w[0]}, r"w3 must be \[5, 24, 16\], found \[24, 16\]"),
    ({"w3": lambda w: w[:, :16]}, r"w3 must be \[5, 24, 16\], found \[5, 16, 16\]"),
    ({"w3": lambda w: w.half()}, "w3 must have x's dtype BFloat16, found Half"),
    ({"w3": lambda w: w.cpu()}, "w3 must be on CUDA device 0"),
    ({"w3": transposed}, "w3 must have a contiguous last dimension"),
    ({"weights": lambda w: w.double()}, "weights must be Float, found Double"),
    ({"weights": lambda w: w.bfloat16()}, "weights must be Float, found BFloat16"),
    ({"weights": lambda w: w[:, :1]}, r"weights must be one for each slot, or row, found \[23, 1\]"),
    ({"weights": lambda w: w.flatten()}, r"weights must be one for each slot, or row, found \[46\]"),
    ({"weights": lambda w: w.cpu()}, "weights must be on CUDA device 0"),
    ({"offsets": lambda x: x.long()}, "offsets must be int32, found Long"),
    ({"offsets": lambda x: x[:, None]}, r"offsets must have 1 dimensions, found \[6, 1\]"),
    ({"offsets": lambda x: x[:5]}, r"offsets must be \[experts \+ 1\] = \[6\], found \[5\]"),
    ({"offsets": lambda x: x.cpu()}, "offsets must be on CUDA device 0"),
    ({"row_slot": lambda x: x.long()}, "row_slot must be int32, found Long"),
    ({"row_slot": lambda x: x[None]}, r"row_slot must have 1 dimensions, found \[1, 46\]"),
    ({"row_slot": lambda x: x.cpu()}, "row_slot must be on CUDA device 0"),
    ({"row_slot": lambda x: None}, "row_slot and slot_row must be given together"),
    ({"slot_row": lambda x: None}, "row_slot and slot_row must be given together"),
    ({"slot_row": lambda x: x.long()}, "slot_row must be int32, found Long"),
    ({"slot_row": lambda x: x[0]}, r"slot_row must have 2 dimensions, found \[2\]"),
    ({"slot_row": lambda x: x[:9]}, r"slot_row must have a row per token of x, found \[9, 2\] and \[23, 16\]"),
    ({"slot_row": lambda x: x.cpu()}, "slot_row must be on CUDA device 0"),
    ({"score_mode": lambda x: "before"}, r"score_mode must be one of \('combine', 'activation'\), found 'before'"),
    (
        {"row_slot": lambda x: None, "slot_row": lambda x: None, "weights": lambda w: w[:, 0]},
        "weights of rows multiply the activation: score_mode must be 'activation'",
    ),
    (
        {"row_slot": lambda x: None, "slot_row": lambda x: None, "score_mode": lambda x: "activation"},
        r"weights must be one for each slot, or row, found \[23, 2\]",
    ),
]
NUMBERS = range(len(WRONG_ARGUMENTS))


def changed(number: int) -> tuple[list, str]:
    changes, text = WRONG_ARGUMENTS[number]
    arguments = forward_arguments()
    return [changes[name](x) if name in changes else x for name, x in zip(ARGUMENTS, arguments, strict=True)], text


@pytest.mark.parametrize("number", NUMBERS)
def test_direct_call_names_the_wrong_argument(number: int) -> None:
    """`supports` and the public functions keep these from the operator; called directly, it names them itself."""
    arguments, text = changed(number)
    with pytest.raises(RuntimeError, match=text):
        ops.moe_forward(*arguments)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("dout", lambda x: x[0], r"dout must have 2 dimensions, found \[16\]"),
        ("dout", lambda x: x[:9], r"slot_row must have a row per token of dout, found \[23, 2\] and \[9, 16\]"),
        ("dout", lambda x: x[:, :8], r"dout must be \[23, 16\], found \[23, 8\]"),
        ("dout", lambda x: x.half(), "w2 must have dout's dtype Half, found BFloat16"),
        ("dout", lambda x: x.float(), "dout must be bfloat16 or float16 for the compiled kernels, found Float"),
        ("dout", lambda x: x.cpu(), "dout must be on a CUDA device"),
        ("dout", transposed, "dout must have a contiguous last dimension"),
        ("h", lambda x: x[0], r"h must have 2 dimensions, found \[48\]"),
        ("h", lambda x: x[:9], r"h must be \[46, 48\], found \[9, 48\]"),
        ("h", lambda x: x[:, :24], r"h must be \[46, 48\], found \[46, 24\]"),
        ("h", lambda x: x.float(), "h must have dout's dtype BFloat16, found Float"),
        ("h", lambda x: x.cpu(), "h must be on a CUDA device"),
        ("h", transposed, "h must have a contiguous last dimension"),
        ("w2", lambda w: w[0], r"w2 must be \[experts, model dim, hidden dim\], found \[16, 24\]"),
        ("w2", lambda w: w[:4], r"offsets must be \[experts \+ 1\] = \[5\], found \[6\]"),
        ("w2", lambda w: w.cpu(), "w2 must be on CUDA device 0"),
        ("w2", transposed, "w2 must have a contiguous last dimension"),
        ("weights", lambda w: w.double(), "weights must be Float, found Double"),
        ("weights", lambda w: w[:, :1], r"weights must be one for each slot, or row, found \[23, 1\]"),
        ("slot_row", lambda x: None, "row_slot and slot_row must be given together"),
        ("score_mode", lambda x: "before", r"score_mode must be one of .*, found 'before'"),
    ],
)
def test_direct_call_of_down_backward_names_the_wrong_argument(name: str, change: Callable, text: str) -> None:
    given = dict(zip(ARGUMENTS, forward_arguments(), strict=True))
    given |= {"dout": torch.ones_like(given["x"]), "h": torch.zeros(46, 48, device="cuda", dtype=torch.bfloat16)}
    given[name] = change(given[name])
    names = ("dout", "w2", "weights", "h", "offsets", "row_slot", "slot_row", "score_mode")
    with pytest.raises(RuntimeError, match=text):
        ops.moe_down_backward(*(given[name] for name in names), True)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("dh", lambda x: x[0], r"dh must have 2 dimensions, found \[48\]"),
        ("dh", lambda x: x[:9], r"dh must be \[46, 48\], found \[9, 48\]"),
        ("dh", lambda x: x[:, :24], r"dh must be \[46, 48\], found \[46, 24\]"),
        ("dh", lambda x: x.float(), "dh must be bfloat16 or float16 for the compiled kernels, found Float"),
        ("dh", transposed, "dh must have a contiguous last dimension"),
        ("w1", lambda w: w[0], r"w1 must be \[experts, hidden dim, model dim\], found \[24, 16\]"),
        ("w1", lambda w: w.half(), "w1 must have dh's dtype BFloat16, found Half"),
        ("w3", lambda w: w[:, :16], r"w3 must be \[5, 24, 16\], found \[5, 16, 16\]"),
        ("w3", lambda w: w.cpu(), "w3 must be on CUDA device 0"),
        ("offsets", lambda x: x.long(), "offsets must be int32, found Long"),
        ("row_slot", lambda x: None, "row_slot and slot_row must be given together"),
    ],
)
def test_direct_call_of_up_backward_names_the_wrong_argument(name: str, change: Callable, text: str) -> None:
    given = dict(zip(ARGUMENTS, forward_arguments(), strict=True))
    given["dh"] = torch.zeros(46, 48, device="cuda", dtype=torch.bfloat16)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=text):
        ops.moe_up_backward(*(given[name] for name in ("dh", "w1", "w3", "offsets", "row_slot", "slot_row")))


@pytest.mark.parametrize("hidden", [16, 768])  # permuted before the products, copied beside them
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        "row_slot[0] = 99",
        "row_slot[0] = 2**31 - 1",
        "row_slot[0] = -7",
        "slot_row[0] = 99",
        "slot_row[0] = slot_row[1]",
    ],
)
def test_wrong_map_is_asserted_on_the_device(wrong: str, backward: bool, hidden: int) -> None:
    call = "moe_down_backward(x, w2, None, h" if backward else "moe_forward(x, w, w2, w, None"
    program = (
        "import torch\nfrom flashmoe_train.ops.moe import route_plan\n"
        "ones = lambda *size: torch.ones(size, device='cuda', dtype=torch.bfloat16)\n"
        f"x, w, w2, h = ones(8, 16), ones(4, {hidden}, 16), ones(4, 16, {hidden}), ones(16, 2 * {hidden})\n"
        "ids = torch.arange(16, device='cuda').view(8, 2) % 4\n"
        f"offsets, row_slot, slot_row = route_plan(ids, 4)\n{wrong}\n"
        f"torch.ops.flashmoe.{call}, offsets, row_slot, slot_row, 'combine'{', True' * backward})\n"
        "torch.cuda.synchronize()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 1  # an exception, not a crash of the interpreter
    assert "slot_row" in found.stdout + found.stderr and "device-side assert" in found.stderr
