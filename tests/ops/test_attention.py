"""`flashmoe_train.attention` against the float64 oracle, and as an operator under PyTorch's compiler and autograd."""

import functools
import re

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flashmoe_train import attention
from flashmoe_train.ops.attention import AttentionCase, copies, fallback, supports

from .attention_cases import CASES, Case, cumulative, oracle
from .operators import CountOperators, assert_close_in_norm, assert_opcheck, chooser, forward_backward, saving

ops = torch.ops.flashmoe


def assert_equals_oracle(case: Case, function, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    inputs = case.tensors(dtype, device)
    wanted_out, _ = oracle(case, *inputs)
    dout = torch.randn_like(wanted_out).to(dtype)
    wanted = wanted_out.detach(), *torch.autograd.grad(wanted_out, inputs, dout.double())
    found = forward_backward(function, inputs, dout)
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert x.dtype == dtype
        assert_close_in_norm(name, x, y)


# ---------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_oracle(case: Case) -> None:
    function = functools.partial(attention, **case.arguments())
    assert_equals_oracle(case, function)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fallback_equals_oracle(case: Case) -> None:
    assert_equals_oracle(case, functools.partial(run_fallback, case=case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_function_on_gpu_equals_oracle(case: Case, dtype: torch.dtype) -> None:
    function = functools.partial(attention, **case.arguments("cuda"))
    assert_equals_oracle(case, function, "cuda", dtype)


def run_fallback(q: Tensor, k: Tensor, v: Tensor, case: Case, deterministic: bool = False) -> Tensor:
    scale, left, right, cu_q, cu_k = case.mask(q)
    return fallback.attention(q, k, v, scale, (left, right), cu_q, cu_k, deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(causal=True, length_q=300), Case(batch=1, length_q=300, documents_q=(100, 200))])
def test_deterministic_gradients_repeat_bitwise_on_gpu(case: Case) -> None:
    inputs = case.tensors(torch.bfloat16, "cuda")
    dout = torch.randn(inputs[0].shape, device="cuda", dtype=torch.bfloat16)
    function = functools.partial(attention, deterministic=True, **case.arguments("cuda"))
    first = forward_backward(function, inputs, dout)
    for x, y in zip(first, forward_backward(function, inputs, dout), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [Case(causal=True), Case(batch=1, length_q=20, documents_q=(5, 15), causal=True)], ids=str
)
def test_does_not_wait_for_the_gpu(case: Case) -> None:
    inputs, arguments = case.tensors(torch.bfloat16, "cuda"), case.arguments("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*inputs, **arguments).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_result_has_the_input_dtype_under_autocast() -> None:
    q, k, v = Case().tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == run_fallback(q, k, v, Case()).dtype == torch.float32


@pytest.mark.parametrize("case", [Case(), Case(length_q=23, length_k=5, causal=True)], ids=str)
def test_lse(case: Case) -> None:
    q, k, v = case.tensors()
    _, wanted = oracle(case, q, k, v)
    _, lse = ops.attention_forward(q, k, v, *case.mask(q), False)
    torch.testing.assert_close(lse.double(), wanted)
    assert not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    assert_equals_oracle(Case(causal=True), functools.partial(attention, causal=True), dtype=dtype)


def test_gradcheck() -> None:
    case = Case(batch=1, length_q=5, length_k=7, dim=4, dim_v=3, causal=True, window=(3, None))
    assert torch.autograd.gradcheck(functools.partial(attention, **case.arguments()), case.tensors(torch.float64))


def test_large_logits_stay_finite() -> None:
    q, k, v = (x.detach() * 100 for x in Case(dim=64).tensors())
    out = attention(q, k, v, softmax_scale=1.0)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), oracle(Case(softmax_scale=1.0), q, k, v)[0])


def test_neighbouring_documents_do_not_leak() -> None:
    q, k, v = (x.detach() for x in Case(batch=1, length_q=30).tensors())
    cu_seqlens = cumulative((10, 10, 10))
    wanted = attention(q, k, v, cu_seqlens_q=cu_seqlens)
    for x in (q, k, v):
        x[:, 10:20] = torch.nan
    out = attention(q, k, v, cu_seqlens_q=cu_seqlens)
    torch.testing.assert_close(out[:, :10], wanted[:, :10])
    torch.testing.assert_close(out[:, 20:], wanted[:, 20:])


def test_packed_tensors_without_batch() -> None:
    q, k, v = Case(batch=1, length_q=30).tensors()
    cu_seqlens = cumulative((10, 20))
    out = attention(q[0], k[0], v[0], causal=True, cu_seqlens_q=cu_seqlens)
    torch.testing.assert_close(out, attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens)[0])


# ---------------------------------------------------------------------------------------------------- as an operator


def operator_arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple:
    q, k, v = case.tensors(dtype)
    return q, k, v, *case.mask(q), False


OPERATOR_CASES = [
    Case(causal=True),
    Case(layout="bhsd", dim=24, dim_v=16, window=(3, 2), softmax_scale=0.35),
    Case(batch=1, length_q=20, documents_q=(5, 15), causal=True),
]


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_opcheck_forward(case: Case) -> None:
    assert_opcheck(ops.attention_forward.default, operator_arguments(case))


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_opcheck_backward(case: Case) -> None:
    q, k, v, *rest = operator_arguments(case)
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = ops.attention_forward(q, k, v, *rest)
    assert_opcheck(ops.attention_backward.default, (torch.randn_like(out), q, k, v, out, lse, *rest))


@pytest.mark.parametrize("documents", [False, True])
def test_compiles_once_for_all_lengths(documents: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return attention(q.sin(), k, v, causal=True, cu_seqlens_q=cu_seqlens).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (17, 33, 300):
            inputs = Case(batch=1 if documents else 2, length_q=length).tensors()
            cu_seqlens = cumulative((length // 2, length - length // 2)) if documents else None
            dout = torch.randn(inputs[0].shape)
            found = forward_backward(functools.partial(compiled, cu_seqlens=cu_seqlens), inputs, dout)
            wanted = forward_backward(functools.partial(function, cu_seqlens=cu_seqlens), inputs, dout)
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("mode, forwards", [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_checkpointing_does_not_recompute(mode: str, forwards: int) -> None:
    q, k, v = Case().tensors()
    block = functools.partial(attention, causal=True)
    wanted = torch.autograd.grad(block(q.sin(), k, v).square().sum(), (q, k, v))
    context = {
        "full": {},
        "selective": {"context_fn": saving(ops.attention_forward.default)},
    }
    with CountOperators() as counter:
        if mode == "none":
            out = block(q.sin(), k, v)
        else:
            out = checkpoint(lambda q, k, v: block(q.sin(), k, v), q, k, v, use_reentrant=False, **context[mode])
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert counter.counts == {"attention_forward": forwards, "attention_backward": 1}
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_saves_inputs_out_and_lse_only() -> None:
    q, k, v = Case().tensors()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(tuple(x.shape)), x)[1], lambda x: x):
        attention(q, k, v)
    assert saved == [(2, 17, 4, 8), (2, 17, 2, 8), (2, 17, 2, 8), (2, 17, 4, 8), (2, 4, 17)]


def test_exports_with_symbolic_length() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x, x, x, causal=True)

    x = torch.randn(2, 16, 4, 8)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Block(), (x,), dynamic_shapes={"x": {1: length}})
    longer = torch.randn(2, 30, 4, 8)
    torch.testing.assert_close(exported.module()(longer), Block()(longer))


def test_flops() -> None:
    q, k, v = Case(batch=1, length_q=64, heads=4, groups=2, dim=24, dim_v=16).tensors()
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 64 * 64 * ((24 + 16) + (3 * 24 + 2 * 16))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, causal=True, window=(9, None))
    assert counter.get_total_flops() == 2 * 4 * (45 + 55 * 10) * (24 + 16)


def test_gradient_of_an_expanded_scalar() -> None:
    q, k, v = Case().tensors()
    attention(q, k, v).sum().backward()  # dout has stride 0 everywhere
    assert q.grad is not None and q.grad.is_contiguous()


# ------------------------------------------------------------------------------------------------------- wrong input

Q, K, V = (torch.randn(2, 6, heads, 8) for heads in (4, 2, 2))
CU = torch.tensor([0, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"q": Q[0]}, ValueError, r"q must be \[batch, seq, heads, head_dim\], found 3"),
        ({"k": K.int()}, TypeError, "k must be floating point"),
        ({"v": V.double()}, TypeError, "one dtype, found v torch.float64 and q torch.float32"),
        ({"k": K.to("meta")}, ValueError, "one device, found k on meta"),
        ({"q": Q[..., ::2]}, ValueError, "q must have a contiguous last dimension, found strides"),
        ({"k": K[:, :5]}, ValueError, "k and v must agree in batch, seq and heads"),
        ({"k": K[:1], "v": V[:1]}, ValueError, "one batch size"),
        ({"q": Q[..., :4]}, ValueError, "one head_dim"),
        ({"q": Q[:, :, :3]}, ValueError, "multiple of those of k, and there be some, found 3 and 2"),
        ({"q": Q[:, :, :0]}, ValueError, "multiple of those of k, and there be some, found 0 and 2"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, found nan"),
        ({"window": (torch.tensor(1.5), None)}, ValueError, "window must be two non-negative sizes or None"),
        ({"window": (-2, None)}, ValueError, "window must be two non-negative sizes or None"),
        ({"window": (1, 2, 3)}, ValueError, "window must be two non-negative sizes or None"),
        ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "q must have a head_dim of at least 1"),
        ({"q": torch.zeros(())}, ValueError, r"q must be \[batch, seq, heads, head_dim\], found 0"),
        ({"cu_seqlens_k": CU}, ValueError, "given together"),
        ({"cu_seqlens_q": CU}, ValueError, "the batch size must be 1"),
        ({"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q must be int32, found torch.int64"),
        ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q must be \[documents \+ 1\]"),
        ({"cu_seqlens_q": CU, "cu_seqlens_k": CU[:1]}, ValueError, "the same documents"),
        ({"cu_seqlens_q": CU, "cu_seqlens_k": CU.to("meta")}, ValueError, "cu_seqlens_k must be on q's device"),
    ],
)
@pytest.mark.parametrize("function", ["operator", "fallback"])
def test_wrong_argument(changes: dict, error: type[Exception], text: str, function: str, monkeypatch) -> None:
    if function == "fallback":
        monkeypatch.setattr("flashmoe_train.ops.attention.supports", lambda case: "not here")
    with pytest.raises(error, match=text):
        attention(**{"q": Q, "k": K, "v": V, **changes})


@pytest.mark.parametrize("bounds", [[1, 6], [0, 4, 3, 6], [0, 7]])
def test_wrong_document_bounds(bounds: list[int]) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0, not decrease and end within the 6 rows"):
        attention(Q[:1], K[:1], V[:1], cu_seqlens_q=cu_seqlens)


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
def test_wrong_backward_argument(name: str) -> None:
    arguments = {"dout": Q, "q": Q, "k": K, "v": V, "out": Q, "lse": torch.zeros(2, 4, 6)}
    for wrong, error in ((arguments[name][..., :3], ValueError), (arguments[name].double(), TypeError)):
        with pytest.raises(error, match=f"{name} must be"):
            ops.attention_backward(*{**arguments, name: wrong}.values(), 1.0, -1, -1, None, None, False)


def test_supports_names_the_reason() -> None:
    case = AttentionCase("cpu", None, torch.bfloat16, 128, 128)
    assert supports(case) is None
    assert "no compiled attention kernel for device type 'xpu'" in str(supports(case._replace(device_type="xpu")))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"capability": "8.0"}, r"GPUs of compute capability 9.0 \(Hopper\), found 8.0"),
        ({"capability": None}, r"GPUs of compute capability 9.0 \(Hopper\), found None"),
        ({"dtype": torch.float32}, "torch.bfloat16 and torch.float16, found torch.float32"),
        ({"head_dim": 80}, "head dims of q and k / of v 64/64, 96/96, 128/128, 192/128, 256/256, found 80/128"),
        ({"positive_scale": False}, "a softmax_scale above 0"),
    ],
)
def test_supports_names_what_the_kernel_does_not_take(changes: dict, text: str) -> None:
    case = AttentionCase("cuda", "9.0", torch.bfloat16, 192, 128)
    assert supports(case, complete=True) is None
    assert re.search(f"^the attention kernel takes {text}$", str(supports(case._replace(**changes), complete=True)))


def layout(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
    numbers = torch.zeros(4096, dtype=torch.bfloat16)
    assert numbers.data_ptr() % 16 == 0
    return numbers.as_strided(shape, strides, offset)


@pytest.mark.parametrize(
    "strides, offset, why",
    [
        ((384, 128, 64, 1), 0, None),  # [b, s, h, d]
        ((384, 64, 192, 1), 0, None),  # [b, h, s, d]
        ((128, 256, 64, 1), 0, None),  # [s, b, h, d]
        ((1152, 384, 64, 1), 128, None),  # keys of a fused projection
        ((384, 128, 64, 1), 8, None),
        ((384, 128, 64, 1), 4, "its address must be a multiple of 16 bytes, found 8 more"),
        ((390, 130, 65, 1), 0, "its stride over batch must be a positive multiple of 16 bytes, found 780; "
                               "its stride over seq must be a positive multiple of 16 bytes, found 260; "
                               "its stride over heads must be a positive multiple of 16 bytes, found 130"),
        ((64, 64, 0, 1), 0, "its stride over heads must be a positive multiple of 16 bytes, found 0"),
    ],
)  # fmt: skip
def test_copies_names_the_layout(strides: tuple[int, ...], offset: int, why: str | None) -> None:
    shape = (2, 3, 2, 64)
    good, x = layout(shape, (384, 128, 64, 1)), layout(shape, strides, offset)
    for i, name in enumerate("qkv"):
        tensors = [good] * 3
        tensors[i] = x
        assert copies(*tensors) == ({name: why} if why else {})
    assert copies(x[:0], good[:0], good[:0]) == copies(x, good[:, :0], good[:, :0]) == {}
    with pytest.raises(ValueError, match="k and v must agree"):
        copies(good, good, good[:, :2])


def test_stride_of_a_single_entry_says_nothing() -> None:
    x = layout((1, 3, 1, 64), (7, 64, 3, 1))
    assert copies(x, x, x) == {}


def test_random_shapes() -> None:
    pick = chooser(seed=1)
    for _ in range(60):
        groups = pick(1, 2, 3)
        case = Case(
            batch=pick(1, 2),
            length_q=pick(1, 7, 31, 63, 64, 65, 129),
            length_k=pick(1, 7, 63, 64, 65, 127),
            heads=groups * pick(1, 2, 3),
            groups=groups,
            dim=pick(4, 8, 24),
            dim_v=pick(4, 8, 16),
            causal=pick(True, False),
            window=(pick(None, 0, 5, 200), pick(None, 0, 5, 200)),
            layout=pick("bshd", "bhsd", "sbhd"),
        )
        assert_equals_oracle(case, functools.partial(attention, **case.arguments()))
