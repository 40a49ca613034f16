"""Attention's CUDA kernel and its gradients among other tensors, streams, graphs and compilers."""

import functools
import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from flashmoe_train import attention
from flashmoe_train.ops.attention import copies
from flashmoe_train.ops.attention.checks import KERNEL_HEAD_DIMS
from flashmoe_train.ops.moe import moe_combine

from .attention_cases import Case, cumulative, oracle
from .attention_gpu import (
    HEAD_DIMS,
    MASKS,
    SMALL,
    VIEWS,
    assert_gradients,
    assert_right,
    kernel,
    out_of,
    random_inputs,
)
from .operators import (
    ON_HOPPER,
    CountOperators,
    assert_close_in_norm,
    assert_opcheck,
    captured,
    forward_backward,
    saving,
)

ops = torch.ops.flashmoe
pytestmark = ON_HOPPER

# ------------------------------------------------------------------------------------------------ memory and neighbours


@pytest.mark.parametrize(
    "case", [Case(length_q=200, causal=True), Case(batch=1, length_q=200, documents_q=(70, 0, 90))], ids=str
)
@pytest.mark.parametrize("dim, dim_v", [(64, 64), (192, 128)])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, dim: int, dim_v: int, case: Case) -> None:
    """Bitwise what contiguous copies give, and no gradient of it is lost."""
    make = functools.partial(VIEWS[view], case.batch, case.length_q)
    shapes = (case.heads, dim), (case.groups, dim), (case.groups, dim_v)
    views = tuple(make(*shape, torch.bfloat16) for shape in shapes)
    copies = tuple(x.clone(memory_format=torch.contiguous_format) for x in views)
    for x, y in zip(kernel(case, *views), kernel(case, *copies), strict=True):
        assert torch.equal(x, y)
    assert_gradients(case, tuple(x.detach().requires_grad_() for x in views))


# Of VIEWS, what TMA cannot read.
COPIED = {
    "end of a head dim, misaligned",
    "odd strides",
    "odd address",
    "one head for all",
    "one row for all",
    "one sequence for all",
    "one vector for all",
}


@pytest.mark.parametrize("dim, dim_v", [(64, 64), (192, 128)])
@pytest.mark.parametrize("view", VIEWS)
def test_copies_what_it_says(view: str, dim: int, dim_v: int) -> None:
    """`copies` knows what the compiled code does: a call allocates more by the bytes of the tensors that it names."""

    def allocated(*inputs: Tensor) -> int:
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        ops.attention_forward(*inputs, dim**-0.5, -1, 0, None, None, False)
        return torch.cuda.memory_stats()["requested_bytes.all.allocated"] - before

    views = [VIEWS[view](2, 200, heads, n, torch.bfloat16) for heads, n in ((4, dim), (2, dim), (2, dim_v))]
    contiguous = [x.clone(memory_format=torch.contiguous_format) for x in views]
    assert not copies(*contiguous)
    without = allocated(*contiguous)
    for i, name in enumerate("qkv"):
        inputs = [*contiguous]
        inputs[i] = views[i]
        assert copies(*inputs).keys() == ({name} if view in COPIED else set())
        assert allocated(*inputs) - without == (views[i].nbytes if view in COPIED else 0)


@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize("lengths", [(10, 10, 10), (100, 129, 71), (64, 192, 128), (1, 1, 300)])
def test_neighbouring_documents_do_not_leak(lengths: tuple[int, int, int], dim: int, dim_v: int) -> None:
    """NaN in a document, and after the last one, reaches no other: neither out nor gradients."""
    total = sum(lengths)
    case = Case(batch=1, length_q=total + 50, dim=dim, dim_v=dim_v, documents_q=lengths, causal=True)
    inputs = random_inputs(case, torch.bfloat16)
    dout = torch.randn(1, total + 50, case.heads, dim_v, device="cuda").bfloat16()
    broken = [x.clone() for x in (*inputs, dout)]
    for x in broken:
        x[:, lengths[0] : lengths[0] + lengths[1]] = x[:, total:] = torch.nan

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        return forward_backward(out_of(case, deterministic=True), (q, k, v), dout)

    found, wanted = run(*broken), run(*(x.clone() for x in inputs), dout)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x[:, : lengths[0]], y[:, : lengths[0]])
        assert torch.equal(x[:, lengths[0] + lengths[1] :], y[:, lengths[0] + lengths[1] :])
        assert not x[:, total:].any()


def forward_and_backward(
    case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: tuple, deterministic: bool
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) by the operators."""
    out, lse = kernel(case, q, k, v, mask, deterministic)
    return out, lse, *ops.attention_backward(dout, q, k, v, out, lse, *mask, deterministic)


@pytest.mark.parametrize("dim, dim_v", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("case", MASKS + SMALL, ids=str)
def test_writes_all_of_its_results(case: Case, dim: int, dim_v: int) -> None:
    """A replayed CUDA graph writes where the capture did: whatever it leaves there is the NaN from before."""
    case = replace(case, dim=dim, dim_v=dim_v)
    q, k, v = random_inputs(case, torch.bfloat16)
    dout = torch.randn(*q.shape[:3], dim_v, device="cuda").bfloat16()
    run = functools.partial(forward_and_backward, case, q, k, v, dout, case.mask(q), True)
    wanted = run()
    graph, results = captured(run)
    for x in results:
        x.fill_(torch.nan)
    graph.replay()
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), results, wanted, strict=True):
        assert torch.equal(x, y), f"{name}: {int(x.isnan().sum())} of {x.numel()} numbers not written"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "case, documents",
    [
        (Case(length_q=300, causal=True), ()),
        (Case(length_q=130, length_k=300, window=(90, None)), ()),
        (Case(batch=1, length_q=300, causal=True, documents_q=(100, 200)), ((300, 0), (1, 290), (0, 150), (0, 0))),
    ],
    ids=str,
)
def test_cuda_graph_replays_with_other_inputs(
    case: Case, documents: tuple[tuple[int, ...], ...], deterministic: bool
) -> None:
    case = replace(case, dim=128)
    buffers = [*random_inputs(case, torch.bfloat16)]
    buffers.append(torch.randn_like(buffers[0]))
    mask = case.mask(buffers[0])
    graph, results = captured(lambda: forward_and_backward(case, *buffers, mask, deterministic))
    for lengths in documents or (None, None):
        for x in buffers:
            x.normal_()
        if lengths is not None:
            mask[3].copy_(cumulative(lengths))
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        wanted = forward_and_backward(case, *buffers, mask, deterministic)
        assert_right("replay", results[:2], oracle(replace(case, documents_q=lengths), *buffers[:3]))
        for i, (x, y) in enumerate(zip(results, wanted, strict=True)):
            if deterministic or i < 2:
                assert torch.equal(x, y)
            else:
                assert_close_in_norm(("dq", "dk", "dv")[i - 2], x, y)


@pytest.mark.parametrize("dim, dim_v", [(64, 64), (128, 128)])
def test_more_than_2_to_the_31_elements_over_the_batch(dim: int, dim_v: int) -> None:
    batch = 2**31 // (64 * 128 * dim) + 2
    case = Case(batch=batch, length_q=64, heads=128, groups=128, dim=dim, dim_v=dim_v, causal=True)
    inputs = [torch.randn(batch, 64, 128, n, device="cuda", dtype=torch.bfloat16) for n in (dim, dim, dim_v)]
    dout = torch.randn(batch, 64, 128, dim_v, device="cuda", dtype=torch.bfloat16)
    assert inputs[0].numel() > 2**31
    out, lse = kernel(case, *inputs)
    grads = ops.attention_backward(dout, *inputs, out, lse, *case.mask(out), False)
    for entry in (0, 1, batch // 2, batch - 2, batch - 1):
        q, k, v = (x[entry : entry + 1].clone().requires_grad_() for x in inputs)
        wanted = oracle(replace(case, batch=1), q, k, v)
        assert_right(f"entry {entry}", (out[entry : entry + 1], lse[entry : entry + 1]), wanted)
        wanted_grads = torch.autograd.grad(wanted[0], (q, k, v), dout[entry : entry + 1].double())
        for name, x, y in zip(("dq", "dk", "dv"), grads, wanted_grads, strict=True):
            assert_close_in_norm(f"{name} of entry {entry}", x[entry : entry + 1], y)


def test_more_than_2_to_the_31_elements_in_a_sequence() -> None:
    """A window of 128 keys keeps it short; the last rows depend on the last keys alone."""
    length = 2**31 // (64 * 128) + 77
    case = Case(batch=1, length_q=length, heads=64, groups=64, dim=128, causal=True, window=(127, None))
    inputs = [torch.randn(1, length, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    out, lse = kernel(case, *inputs)
    for end in (300, length // 2, length):
        part = [x[:, end - 300 : end] for x in inputs]
        wanted_out, wanted_lse = oracle(replace(case, length_q=300), *part)
        whole = slice(0 if end == 300 else 127, 300)  # rows before see keys before the part
        found = out[:, end - 300 : end][:, whole], lse[:, :, end - 300 : end][:, :, whole]
        assert_right(f"rows up to {end}", found, (wanted_out[:, whole], wanted_lse[:, :, whole]))


# ----------------------------------------------------------------------------------------------------------- as a guest


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "case", [Case(length_q=300, causal=True), Case(batch=1, length_q=300, documents_q=(100, 150))], ids=str
)
def test_second_gpu(case: Case) -> None:
    """Tensors on a GPU that is not the current one, which stays the current one."""
    case = replace(case, dim=128)
    slot_row = torch.randperm(46, device="cuda:1").view(23, 2)
    rows = torch.randn(46, 16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    inputs = case.tensors(torch.bfloat16, "cuda:1")
    assert_right("out", kernel(case, *inputs), oracle(case, *inputs))
    assert torch.cuda.current_device() == 0
    assert_gradients(case, inputs)
    torch.testing.assert_close(moe_combine(rows, slot_row.int(), None), rows[slot_row].sum(1))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    "case", [Case(length_q=300, causal=True), Case(batch=1, length_q=300, documents_q=(100, 200))], ids=str
)
def test_runs_on_the_current_stream(case: Case) -> None:
    """On any other it would not wait for its inputs."""
    case = replace(case, dim=128)
    real = random_inputs(case, torch.bfloat16)
    dout = torch.randn_like(real[0])
    mask = case.mask(real[0])
    wanted = forward_and_backward(case, *real, dout, mask, True)
    late = [torch.full_like(x, torch.nan) for x in real]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, real, strict=True):
            x.copy_(y)
        found = forward_and_backward(case, *late, dout, mask, True)
    torch.cuda.synchronize()
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("view", ["[b, h, s, d]", "odd strides"])
@pytest.mark.parametrize("case", [*MASKS[:2], MASKS[9], MASKS[15]], ids=str)
def test_does_not_wait_for_the_gpu(case: Case, view: str, deterministic: bool) -> None:
    q, k, v = (
        VIEWS[view](case.batch, case.length_q, heads, 64, torch.bfloat16).requires_grad_()
        for heads in (case.heads, case.groups, case.groups)
    )
    mask = case.mask(q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = kernel(case, q, k, v, mask, deterministic)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [MASKS[1], MASKS[9], MASKS[15], Case(length_q=300, groups=1, causal=True)], ids=str)
def test_repeats_bitwise(case: Case) -> None:
    case = replace(case, dim=128)
    inputs = case.tensors(torch.bfloat16, "cuda")
    dout = torch.randn(inputs[0].shape, device="cuda").bfloat16()
    run = functools.partial(forward_backward, out_of(case, deterministic=True), inputs, dout)
    for x, y in zip(run(), run(), strict=True):
        assert torch.equal(x, y)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_direct_call_takes_the_head_dims_that_it_says(op: str) -> None:
    """`supports` keeps others from the operator; called directly, it names them."""
    allowed, taken = ", ".join(f"{d}/{v}" for d, v in KERNEL_HEAD_DIMS), []
    for dim, dim_v in itertools.product((8, 32, 64, 80, 96, 128, 192, 256, 264), repeat=2):
        q, k, v = random_inputs(Case(length_q=40, dim=dim, dim_v=dim_v), torch.bfloat16)
        out, lse = q.new_zeros(*q.shape[:3], dim_v), torch.zeros(2, 4, 40, device="cuda")
        tensors = (q, k, v) if op == "attention_forward" else (out, q, k, v, out, lse)
        try:
            getattr(ops, op)(*tensors, 1.0, -1, 0, None, None, False)
            taken.append((dim, dim_v))
        except RuntimeError as error:
            wanted = f"the attention kernel takes head dims of q and k / of v {allowed}, found {dim}/{dim_v}"
            assert re.search(wanted, str(error)), error
    assert taken == list(KERNEL_HEAD_DIMS)


def test_gradients_have_no_gradient() -> None:
    case = Case(length_q=40, dim=64)
    q, k, v = case.tensors(torch.bfloat16, "cuda")
    (dq,) = torch.autograd.grad(kernel(case, q, k, v)[0].float().square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="flashmoe::attention_backward has no gradient"):
        dq.sum().backward()


OPERATOR_CASES = [
    Case(length_q=40, dim=64, causal=True),
    Case(length_q=40, dim=192, dim_v=128, layout="bhsd", window=(3, 2)),
    Case(batch=1, length_q=40, dim=64, documents_q=(5, 30), causal=True),
]


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = case.tensors(torch.bfloat16, "cuda")
    rest = *case.mask(inputs[0]), True  # deterministic: compiled and eager gradients are compared
    assert_opcheck(ops.attention_forward.default, (*inputs, *rest))
    q, k, v = (x.detach() for x in inputs)
    out, lse = kernel(case, q, k, v)
    assert_opcheck(ops.attention_backward.default, (torch.randn_like(out), q, k, v, out, lse, *rest))


@pytest.mark.parametrize("documents", [False, True])
def test_compiles_once_for_all_lengths(documents: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return attention(q * 2, k, v, causal=True, cu_seqlens_q=cu_seqlens, deterministic=True) * 2

    def eager(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(case, q * 2, k, v, deterministic=True)[0] * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (17, 133, 300):
            lengths = (length // 2, length - length // 2) if documents else None
            case = Case(batch=1 if documents else 2, length_q=length, dim=64, causal=True, documents_q=lengths)
            inputs = case.tensors(torch.bfloat16, "cuda")
            cu_seqlens = case.arguments("cuda").get("cu_seqlens_q")
            dout = torch.randn(inputs[0].shape, device="cuda").bfloat16()
            found = forward_backward(functools.partial(compiled, cu_seqlens=cu_seqlens), inputs, dout)
            wanted = forward_backward(functools.partial(eager, case), inputs, dout)
            for x, y in zip(found, wanted, strict=True):
                assert torch.equal(x, y)


def test_compiled_code_calls_the_operator() -> None:
    q, k, v = random_inputs(Case(length_q=40, dim=64), torch.bfloat16)
    recorder = EagerAndRecordGraphs()
    torch.compile(functools.partial(attention, causal=True), fullgraph=True, backend=recorder)(q, k, v)
    (graph,) = recorder.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("flashmoe.attention_forward" in target for target in called), called


def test_selective_checkpointing_does_not_recompute() -> None:
    q, k, v = Case(length_q=200, dim=128).tensors(torch.bfloat16, "cuda")
    dout = torch.randn(q.shape, device="cuda").bfloat16()

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k, v, causal=True, deterministic=True)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, q, k, v, use_reentrant=False, context_fn=saving(ops.attention_forward.default))

    wanted = forward_backward(block, (q, k, v), dout)
    with CountOperators() as counter:
        found = forward_backward(checkpointed, (q, k, v), dout)
    assert counter.counts == {"attention_forward": 1, "attention_backward": 1}
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
