"""What is timed is what was found right: references, the check before timing, the stopwatch, the comparison of runs."""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import flashmoe_train
from flashmoe_train.bench import attention, attention_cases, moe, moe_cases, moe_parts, peers
from flashmoe_train.bench.measure import OperatorBench, Problem, Unavailable, compiled, relative_error, worst
from flashmoe_train.bench.moe_cases import draw
from flashmoe_train.bench.moe_reference import forward_error, gradient_error
from flashmoe_train.bench.results import Results, Row, commit, compare, here, read
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.ops.attention.reference import reference_backward, reference_forward

from ..ops.attention_cases import Case as AttentionCase
from ..ops.attention_cases import oracle as attention_oracle
from ..ops.moe_cases import oracle

CPU = torch.device("cpu")
FORWARD, BACKWARD, BOTH = attention.BENCHES
MOE_FORWARD, MOE_BACKWARD = moe.BENCHES
(PARTS,) = moe_parts.BENCHES


def stopwatch() -> Stopwatch:
    return Stopwatch(CPU, seconds=0, rounds=(1, 1))


# ------------------------------------------------------------------------------------------- wrong results are caught


class Broken:
    """An implementation whose results go through `change`; counts its runs."""

    def __init__(self, function, change) -> None:
        self.function, self.change, self.runs = function, change, 0

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.change(self.function(*args, **kwargs))


def assert_caught(row: Row, name: str, broken: Broken) -> None:
    assert "relative error" in row.failed[name]
    assert name not in row.ms and name not in row.tflops and name not in row.gb_per_s
    assert broken.runs == 1  # for the check; never for a time
    assert set(row.ms) > {"flashmoe", "grouped"} - {name}


@pytest.mark.parametrize("name", ["flashmoe", "grouped"])
@pytest.mark.parametrize("change", [lambda out: out * 1.011, lambda out: out * math.nan, lambda out: out[:-1]])
def test_wrong_result_is_not_timed(name: str, change, monkeypatch: pytest.MonkeyPatch) -> None:
    case = moe_cases.Case("small", 48, 32, 24, 8, 2)
    broken = Broken({"flashmoe": flashmoe_train.moe, "grouped": moe.grouped}[name], change)
    monkeypatch.setitem(moe.LAYERS, name, moe.plain(broken))
    assert_caught(MOE_FORWARD.measure(case, stopwatch()), name, broken)


class WrongGradient(torch.autograd.Function):
    """The identity whose gradient is changed."""

    @staticmethod
    def forward(ctx, x: Tensor, change) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad.clone()), None


def _one_expert(grad: Tensor) -> Tensor:
    grad[0] = grad[1]
    return grad


@pytest.mark.parametrize(
    "argument, change",
    [
        (0, lambda grad: grad * 1.011),
        (1, _one_expert),
        (2, lambda grad: grad * math.nan),
        (3, lambda grad: -grad),
        (5, lambda grad: grad * 1.011),
    ],
)
def test_wrong_expert_gradient_is_not_timed(argument: int, change, monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(*arguments: Tensor) -> Tensor:
        changed = [WrongGradient.apply(x, change) if i == argument else x for i, x in enumerate(arguments)]
        return flashmoe_train.moe(*changed)

    broken = Broken(layer, lambda out: out)
    monkeypatch.setitem(moe.LAYERS, "flashmoe", moe.plain(broken))
    case = moe_cases.Case("small", 48, 32, 24, 8, 2)
    assert_caught(MOE_BACKWARD.measure(case, stopwatch()), "flashmoe", broken)


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("case", attention_cases.TINY, ids=lambda case: case.label)
def test_wrong_attention_gradient_is_not_timed(
    argument: int, case: attention_cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = attention.FORWARDS["flashmoe"]

    def wrong(*arguments):
        def forward(*qkv: Tensor) -> Tensor:
            factor = 1.011
            changed = [WrongGradient.apply(x, lambda g: g * factor) if i == argument else x for i, x in enumerate(qkv)]
            return make(*arguments)(*changed)

        return forward

    monkeypatch.setitem(attention.FORWARDS, "flashmoe", wrong)
    row = BACKWARD.measure(case, stopwatch())
    assert "relative error 1." in row.failed["flashmoe"] and "flashmoe" not in row.ms


def test_wrong_attention_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mask that is easiest to get wrong: documents that see each other.
    case = attention_cases.TINY[-1]
    make = attention.FORWARDS["flashmoe"]
    monkeypatch.setitem(attention.FORWARDS, "flashmoe", lambda case, documents: make(case, None))
    row = FORWARD.measure(case, stopwatch())
    assert "relative error" in row.failed["flashmoe"] and not row.ms


def _swapped_rows(plan: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    offsets, row_slot, slot_row = plan
    return offsets, row_slot[torch.tensor([1, 0, *range(2, len(row_slot))])], slot_row


@pytest.mark.parametrize(
    "op, function, change",
    [
        ("route_plan", "route_plan", _swapped_rows),
        ("route_plan", "route_plan", lambda plan: (plan[0] + 1, *plan[1:])),
        ("router_topk", "router_topk", lambda found: (found[0] * 1.01, *found[1:])),
        ("router_topk", "router_topk", lambda found: (found[0], found[1].flip(0), *found[2:])),
        ("router_topk", "router_topk", lambda found: (*found[:3], found[3] + 1)),
        ("moe_permute", "moe_permute", lambda rows: rows.flip(0)),
        ("moe_glu", "moe_glu", lambda out: out * 1.02),
        ("moe_combine", "moe_combine", lambda out: out * 1.02),
        ("moe_combine_unweighted", "moe_combine", lambda out: out * math.nan),
    ],
)
def test_wrong_part_is_not_timed(op: str, function: str, change, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(getattr(moe_parts, function), change)
    monkeypatch.setattr(moe_parts, function, broken)
    row = PARTS.measure(moe_parts.Case(op, "small", 40, 24, 6, 3, 16), stopwatch())
    assert "relative error" in row.failed["flashmoe"] and "flashmoe" not in row.ms and broken.runs == 1
    assert row.baselines  # the others are timed all the same


@pytest.mark.parametrize("which", [0, 1])
def test_wrong_part_gradient_is_found(which: int) -> None:
    problem = PARTS.prepare(moe_parts.Case("moe_combine_backward", "small", 40, 24, 6, 3), CPU)
    found = list(problem.contenders["flashmoe"]()())
    assert problem.error(found) < problem.error_bound
    found[which] = found[which] * 1.02
    assert problem.error(found) > problem.error_bound


def test_failure_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(moe_parts, "moe_permute", lambda x, *plan: x)
    assert flashmoe_train_bench_run("moe_parts") == 1
    assert "FAILED: moe_permute tiny: flashmoe: relative error inf" in capsys.readouterr().out


def flashmoe_train_bench_run(subject: str) -> int:
    from flashmoe_train.bench import Options, run

    return run(Options(subject, device="cpu"))


# --------------------------------------------------------------------------------------------- what cannot be measured


def problem(**contenders) -> Problem:
    def error(found: float) -> float:
        return found

    return Problem(contenders, error, error_bound=1e-2, work=1e9, flashmoe_path="kernel", floors={})


def bench_of(prepare) -> OperatorBench:
    return OperatorBench(
        name="attention_forward", title="A bench", rate="tflops", standard=[], tiny=[], prepare=prepare
    )


def raising(error: Exception):
    def contender():
        raise error

    return contender


CASE = moe_cases.Case("small", 8, 8, 8, 2, 1)


def test_absent_baselines_are_skipped_with_their_reasons() -> None:
    contenders = {
        "flashmoe": lambda: lambda: 0.0,
        "a": raising(Unavailable("not installed")),
        "b": raising(RuntimeError("No kernel. Aborting.\nmore")),
        "c": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")),
        "d": lambda: raising(TypeError("no such argument")),
    }
    row = bench_of(lambda case, device: problem(**contenders)).measure(CASE, stopwatch())
    assert row.skipped == {
        "a": "not installed",
        "b": "RuntimeError: No kernel",
        "c": "out of memory: CUDA out of memory. Tried to allocate 9 GiB",
        "d": "TypeError: no such argument",
    }
    assert set(row.ms) == {"flashmoe"} and not row.failed


def test_we_may_not_refuse() -> None:
    row = bench_of(lambda case, device: problem(flashmoe=raising(ValueError("bad")))).measure(CASE, stopwatch())
    assert row.failed == {"flashmoe": "ValueError: bad"} and not row.ms


def test_we_may_not_need_more_memory_than_others() -> None:
    ours = raising(torch.OutOfMemoryError("CUDA out of memory. GPU 0 has"))
    row = bench_of(lambda case, device: problem(flashmoe=ours, a=lambda: lambda: 0.0)).measure(CASE, stopwatch())
    assert "out of memory" in row.failed["flashmoe"] and not row.skipped and set(row.ms) == {"a"}


def test_who_breaks_down_when_called_again_is_left_out() -> None:
    calls = iter([0.0])

    def once() -> float:
        if (error := next(calls, None)) is None:
            raise RuntimeError("only once")
        return error

    contenders = {"flashmoe": lambda: lambda: 0.0, "a": lambda: once}
    row = bench_of(lambda case, device: problem(**contenders)).measure(CASE, stopwatch())
    assert row.skipped == {"a": "RuntimeError: only once"} and set(row.ms) == set(row.error) == {"flashmoe"}


def test_case_that_does_not_fit_is_skipped() -> None:
    def prepare(case, device) -> Problem:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")

    row = bench_of(prepare).measure(CASE, stopwatch())
    assert row.skipped == {"*": "out of memory: CUDA out of memory. Tried to allocate 9 GiB"} and not row.ms


def test_peer_that_is_not_installed() -> None:
    with pytest.raises(Unavailable, match="not installed"):
        peers.import_peer("surely_not_a_module.part")
    with pytest.raises(Unavailable, match="cannot be imported"):
        peers.import_peer("json.surely_not_a_part")


# Peers do not run on a CPU, so these stand in for them: what is tested is how they are called and how their results
# become ours.


@pytest.mark.parametrize("case", [attention_cases.TINY[1], attention_cases.TINY[3]], ids=lambda case: case.label)
@pytest.mark.parametrize("tuples", [False, True])
def test_flash_attention_front(case: attention_cases.Case, tuples: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool):
        out = flashmoe_train.attention(q, k, v, causal=causal)
        return (out, None) if tuples else out

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert cu_seqlens_k is cu_seqlens_q and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        out = flashmoe_train.attention(q, k, v, causal=causal, cu_seqlens_q=cu_seqlens_q)
        return (out, None) if tuples else out

    front = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", front)
    row = BACKWARD.measure(case, stopwatch())
    assert row.error["fa3"] == row.error["flashmoe"] and "fa3" in row.ms


@pytest.mark.parametrize("case", [attention_cases.TINY[1], attention_cases.TINY[3]], ids=lambda case: case.label)
def test_flash_attention_operators(case: attention_cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(q: Tensor, softmax_scale: float, is_causal: bool, packed: dict) -> tuple:
        assert (q.dim() == 3) == bool(packed)
        return softmax_scale, -1, 0 if is_causal else -1, *[packed.get(f"cu_seqlens_{side}") for side in "qk"], False

    def operands(*tensors: Tensor, packed: dict) -> list[Tensor]:
        return [x[None] if packed else x for x in tensors]

    def fwd(q, k, v, softmax_scale, is_causal, num_splits, **packed):
        assert num_splits == 1
        out, lse = reference_forward(*operands(q, k, v, packed=packed), *arguments(q, softmax_scale, is_causal, packed))
        return out[0] if packed else out, lse, None, None

    def bwd(dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, is_causal, **packed):
        grads = reference_backward(
            *operands(dout, q, k, v, out, packed=packed), lse, *arguments(q, softmax_scale, is_causal, packed)
        )
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad[0] if packed else grad)

    monkeypatch.setitem(sys.modules, "flash_attn_3", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", SimpleNamespace())
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=fwd, bwd=bwd), raising=False)
    row = BACKWARD.measure(case, stopwatch())
    assert row.error["fa3"] == row.error["flashmoe"] and "fa3" in row.ms


@pytest.mark.parametrize("bench", [MOE_FORWARD, MOE_BACKWARD], ids=lambda bench: bench.name)
def test_sonicmoe(bench: OperatorBench, monkeypatch: pytest.MonkeyPatch) -> None:
    training = bench is MOE_BACKWARD

    def entry(x, scores, token, expert, w13, b1, w2, b2, experts, stream, activation, is_inference_mode_enabled):
        assert is_inference_mode_enabled != training and b1 is b2 is None and activation == "swiglu"
        top_k = len(token) // len(x)
        assert token.tolist() == [t for t in range(len(x)) for _ in range(top_k)] and experts == w2.shape[2]
        w13, w2 = w13.permute(2, 0, 1), w2.permute(2, 0, 1)
        ids, weights = expert.view(len(x), top_k), scores.view(len(x), top_k)
        return flashmoe_train.moe(x, w13[:, ::2].contiguous(), w2, w13[:, 1::2].contiguous(), ids, weights), None

    monkeypatch.setitem(sys.modules, "sonicmoe", SimpleNamespace(moe_general_routing_inputs=entry))
    enums = SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    row = bench.measure(moe_cases.TINY[0], stopwatch())
    assert row.error["sonicmoe"] == row.error["flashmoe"] and "sonicmoe" in row.ms, (row.failed, row.skipped)


# ---------------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("skew, experts", [(0.0, 6), (1.0, 40)])  # with 40, some have no token
def test_moe_reference_equals_autograd(skew: float, experts: int) -> None:
    tokens, model, hidden, top_k = 20, 6, 5, 3
    ids, weights = draw(tokens, experts, top_k, skew, CPU)
    shapes = (tokens, model), (experts, hidden, model), (experts, model, hidden), (experts, hidden, model)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [weights.double()]
    inputs = [x.requires_grad_() for x in inputs]
    out = oracle(*inputs, ids)
    dout = torch.randn_like(out)
    grads = list(torch.autograd.grad(out, inputs, dout))
    plain = [x.detach() for x in inputs]
    assert forward_error(plain, ids, out.detach()) < 1e-14
    assert gradient_error(plain, ids, dout, grads) < 1e-14
    for i in range(5):
        changed = [grad * 1.01 if j == i else grad for j, grad in enumerate(grads)]
        assert gradient_error(plain, ids, dout, changed) == pytest.approx(0.01)
    assert gradient_error(plain, ids, dout, [*grads[:2], grads[2].mT, *grads[3:]]) == math.inf
    if experts == 40:  # what belongs to an expert without a token has to be zero
        nobody = next(e for e in range(experts) if not (ids == e).any())
        grads[1] = grads[1].index_fill(0, torch.tensor([nobody]), 1.0)
        assert gradient_error(plain, ids, dout, grads) > 0.01


def test_attention_problem_uses_the_operators_conventions() -> None:
    case = attention_cases.Case(b=1, s=50, h=4, h_kv=2, d=8, causal=True, dtype="fp32", documents=(3, 20))
    found = FORWARD.prepare(case, CPU)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, heads, 8) for heads in (4, 2, 2))
    like = AttentionCase(length_q=50, causal=True, documents_q=tuple(case.lengths))
    out, _ = attention_oracle(like, q, k, v)
    assert found.error((out,)) < 1e-14
    torch.testing.assert_close(found.contenders["flashmoe"]()()[0].double(), out, rtol=1e-5, atol=1e-5)  # same inputs


def test_errors_of_nan_and_shape_are_errors() -> None:
    x = torch.randn(4)
    assert relative_error(x, x.double()) == 0 and relative_error(x[:1], x.double()) == math.inf
    assert math.isnan(worst([0.1, math.nan, 0.2])) and math.isnan(worst([math.nan, 0.2]))
    assert worst([0.1, 0.3]) == 0.3


@pytest.mark.slow
def test_compiled_baseline() -> None:
    """Compiling for the CPU is left out of the tiny cases; here it is seen to work."""
    ids, weights = draw(16, 4, 2, 0.0, CPU)
    shapes = (16, 8), (4, 16, 8), (4, 8, 16), (4, 16, 8)
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    out = compiled(moe.grouped, torch.device("cuda"))(*inputs, ids, weights)
    assert forward_error([*inputs, weights], ids, out) < 1e-2


# --------------------------------------------------------------------------------------------------- cases and numbers


def test_standard_cases() -> None:
    points = [case for case in FORWARD.standard if FORWARD.is_point(case)]
    assert len(points) == 20 and len(FORWARD.standard) == 34
    assert all(case.b * case.s == 16384 and case.h * case.d == 2048 for case in points)
    for bench in (FORWARD, BACKWARD, BOTH, MOE_FORWARD, MOE_BACKWARD, PARTS):
        for cases in (bench.standard, bench.tiny):
            assert max(Counter(case.label for case in cases).values()) == 1
            assert max(Counter(str(case.as_json()) for case in cases).values()) == 1
    (equal,) = FORWARD.matching("*varlen of 2k")
    (point,) = FORWARD.matching("causal d128 s2k b8 h16")
    assert equal.lengths == [2048] * 8 and equal.flops(backward=True) == point.flops(backward=True)
    assert sum(case.skew > 0 for case in MOE_FORWARD.standard) == 2
    assert attention_cases.Case(2, 64, 4, 32, True).as_json() == {
        "b": 2, "s": 64, "h": 4, "h_kv": 4, "d": 32, "dv": 32, "causal": True, "dtype": "bf16",
    }  # fmt: skip


def test_attention_flops() -> None:
    full = attention_cases.Case(b=2, s=1024, h=4, d=64, causal=False)
    assert full.flops(backward=False) == 4 * 2 * 4 * 1024**2 * 64
    assert full.flops(backward=True) == 2.5 * full.flops(backward=False)
    assert replace(full, causal=True).flops(backward=False) == full.flops(backward=False) / 2
    packed = replace(full, b=1, documents=(10, 100))
    assert sum(packed.lengths) == 1024 and max(packed.lengths) <= 100 and len(packed.lengths) > 10
    assert packed.flops(backward=False) == 4 * 4 * 64 * sum(n * n for n in packed.lengths)


def test_routing() -> None:
    for skew in (0.0, 1.0):
        ids, weights = draw(2000, 32, 4, skew, CPU)
        assert ids.dtype == torch.int32 and ids.min() >= 0 and ids.max() < 32
        assert all(len(set(row)) == 4 for row in ids.tolist())
        torch.testing.assert_close(weights.sum(1), torch.ones(2000))
        counts = torch.bincount(ids.flatten(), minlength=32).sort(descending=True).values.tolist()
        mean = 2000 * 4 / 32
        assert counts[0] < 1.4 * mean if skew == 0 else counts[0] > 4 * mean
        assert counts[-1] > 0.6 * mean if skew == 0 else counts[-1] < 0.5 * mean


# ------------------------------------------------------------------------------------------------------- the stopwatch


def test_stopwatch_takes_turns() -> None:
    order: list[str] = []
    watch = Stopwatch(CPU, seconds=1, rounds=(4, 4))
    times = watch.medians({name: lambda name=name: order.append(name) for name in "abc"})
    assert set(times) == set("abc") and min(times.values()) > 0
    warm_up, turns = order[:9], order[9:]
    assert warm_up == list("aaabbbccc")
    assert turns == list("abcbcacababc")


def test_stopwatch_gives_slow_runs_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    order: list[str] = []

    def run(name: str, seconds: float) -> None:
        clock[0] += seconds
        order.append(name)

    watch = Stopwatch(CPU, seconds=0.1, rounds=(2, 10))
    times = watch.medians({"fast": lambda: run("fast", 0.001), "slow": lambda: run("slow", 0.03)})
    assert times == pytest.approx({"fast": 1.0, "slow": 30.0})
    turns = "".join(name[0] for name in order[6:])
    assert turns.count("f") == 10 and turns.count("s") == 3
    assert "ss" not in turns and turns.index("s") > 2  # spread over all


def test_no_flush_without_a_gpu() -> None:
    assert Stopwatch(CPU)._buffer is None


@pytest.mark.gpu
def test_flush_is_larger_than_the_cache() -> None:
    buffer = Stopwatch(torch.device("cuda"))._buffer
    assert buffer is not None and buffer.nbytes > torch.cuda.get_device_properties(0).L2_cache_size


@pytest.mark.gpu
def test_stopwatch_on_gpu() -> None:
    watch = Stopwatch(torch.device("cuda"), seconds=0.1)
    x = torch.randn(2**26, device="cuda")
    times = watch.medians({"one": lambda: x + 1, "two": lambda: (x + 1, x + 2)})
    assert 1.7 < times["two"] / times["one"] < 2.3
    assert watch.peak_gib(lambda: x + 1) == pytest.approx(0.25, rel=0.01)


# ---------------------------------------------------------------------------------------------------------- comparison


def results(*rows: dict[str, float], labels: str = "abc") -> Results:
    about = dict.fromkeys(("gpu", "torch", "driver", "commit", "date", "command"), "x")
    made = [Row(case={"T": i}, label=labels[i], ms=ms) for i, ms in enumerate(rows)]
    return Results(bench="moe_forward", gpus=1, rows=made, **about)


@pytest.mark.parametrize(
    "now, stored, compared, worse",
    [
        ({"flashmoe": 1.04, "a": 2.0}, {"flashmoe": 1.0, "a": 2.0}, 1, 0),
        ({"flashmoe": 1.06, "a": 2.0}, {"flashmoe": 1.0, "a": 2.0}, 1, 1),
        ({"flashmoe": 2.0, "a": 4.0}, {"flashmoe": 1.0, "a": 2.0}, 1, 0),  # a slower machine
        ({"flashmoe": 1.0, "a": 2.0, "b": 1.2}, {"flashmoe": 1.0, "a": 2.0}, 1, 0),  # b is new
        ({"flashmoe": 1.0, "a": 2.0, "b": 1.2}, {"flashmoe": 1.0, "a": 2.0, "b": 2.0}, 1, 1),  # b was as slow as a
        ({"flashmoe": 1.5, "a": 2.0}, {"flashmoe": 1.0, "a": 2.0, "b": 1.2}, 1, 1),  # b is not here any more
        ({"flashmoe": 1.0, "a": 2.0}, {"flashmoe": 1.0, "b": 2.0}, 0, 0),
        ({"flashmoe": 9.0, "copy": 2.0, "gemm_floor": 2.0}, {"flashmoe": 1.0, "copy": 2.0, "gemm_floor": 2.0}, 0, 0),
        ({"a": 2.0}, {"flashmoe": 1.0, "a": 2.0}, 1, 1),  # ours was not measured any more
        ({"flashmoe": 1.0, "a": 2.0}, {"a": 2.0}, 0, 0),
    ],
)
def test_comparison(now: dict, stored: dict, compared: int, worse: int) -> None:
    count, reasons = compare(results(now), results(stored), tolerance=0.05)
    assert (count, len(reasons)) == (compared, worse)
    assert all(reason.startswith("moe_forward: a: ") for reason in reasons)


def test_what_nobody_ran_is_said_once(tmp_path: Path) -> None:
    made = results({"flashmoe": 1.0}, {"flashmoe": 2.0, "b": 3.0})
    made.rows[0].skipped = {"a": "not installed", "b": "too large"}
    made.rows[1].skipped = {"a": "not installed"}
    made.write(tmp_path / "moe_forward.json")
    written = read(tmp_path / "moe_forward.json")
    assert written.skipped == {"a": "not installed"}
    assert [row.skipped for row in written.rows] == [{"b": "too large"}, {}]
    assert made.rows[0].skipped == {"a": "not installed", "b": "too large"}  # another row may come


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHMOE_COMMIT", "abc1234-dirty")
    assert commit() == "abc1234-dirty"
    monkeypatch.delenv("FLASHMOE_COMMIT")
    monkeypatch.setattr(flashmoe_train, "__file__", str(tmp_path / "flashmoe_train/__init__.py"))
    assert commit() == f"v{flashmoe_train.__version__}"


def test_numbers_are_written_with_four_digits(tmp_path: Path) -> None:
    pick = random.Random(0)
    made = results({"flashmoe": pick.random() / 3, "a": 123456.789})
    made.write(tmp_path / "x.json")
    assert read(tmp_path / "x.json").rows[0].ms == {
        "flashmoe": pytest.approx(made.rows[0].ms["flashmoe"], rel=1e-3),
        "a": 123500.0,
    }


def test_nan_of_one_process_is_seen() -> None:
    assert math.isnan(worst([1e-7, math.nan])) and math.isnan(worst([math.nan, 1e-7]))


def test_diverged_loss_is_written_as_null(tmp_path: Path) -> None:
    results = here("train_torchtitan", "flashmoe bench train", torch.device("cpu"))
    results.rows.append(Row(case={"recipe": "x"}).model_copy(update={"loss": {"stock": [1.0, math.nan]}}))
    results.write(tmp_path / "train.json")
    (row,) = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert row["loss"] == {"stock": [1.0, None]}
