"""The modules: parameters and projections around the operators, compared with what PyTorch computes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashmoe_train import attention, moe
from flashmoe_train.nn import Attention, MoE, Router

from . import processes
from .ops.operators import Copied


def plain_attention(module: Attention, x: Tensor) -> Tensor:
    """The same by complex numbers, repeated heads and a dense mask."""
    batch, length, _ = x.shape
    dim = module.head_dim

    def heads(w: nn.Linear) -> Tensor:
        return (x @ w.weight.T).view(batch, length, -1, dim).transpose(1, 2)

    def turned(y: Tensor) -> Tensor:
        if module.rope_theta is None:
            return y.double()
        position = torch.arange(length, dtype=torch.float64)
        frequency = module.rope_theta ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
        turn = torch.polar(torch.ones(length, dim // 2, dtype=torch.float64), position[:, None] * frequency)
        z = torch.complex(*y.double().chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    q, k, v = turned(heads(module.wq)), turned(heads(module.wk)), heads(module.wv).double()
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    left, right = (math.inf if side is None else side for side in module.window)
    seen = (i - j <= left) & (j - i <= (0 if module.causal else right))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.transpose(1, 2).flatten(2) @ module.wo.weight.T.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 1, "head_dim": 24, "window": (3, None)},
        {"causal": False, "window": (2, 1), "rope_theta": None},
    ],
)
def test_attention(options: dict) -> None:
    torch.manual_seed(0)
    module, x = Attention(32, 4, **options), torch.randn(2, 11, 32)
    torch.testing.assert_close(module(x).double(), plain_attention(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 1}, {"rope_theta": None}], ids=str)
def test_attention_kernel_reads_in_place(options: dict) -> None:
    module = Attention(128, 2, dtype=torch.bfloat16, **options)
    with Copied() as copied:
        module(torch.randn(2, 11, 128, dtype=torch.bfloat16))
        module(torch.randn(1, 11, 128, dtype=torch.bfloat16), torch.tensor([0, 5, 11], dtype=torch.int32))
    assert copied.calls == [{}, {}]


class Deterministic(TorchDispatchMode):
    """Collects what the attention operators were told about the order of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.flashmoe.attention_forward.default, torch.ops.flashmoe.attention_backward.default):
            self.told.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("said", [None, False, True])
@pytest.mark.parametrize("process", [False, True])
def test_deterministic_attention_reaches_the_operators(said: bool | None, process: bool) -> None:
    module = Attention(32, 4, deterministic=said)
    torch.use_deterministic_algorithms(process)
    try:
        with Deterministic() as found:
            module(torch.randn(2, 11, 32)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.told == [process if said is None else said] * 2


def test_attention_within_documents() -> None:
    torch.manual_seed(0)
    module, x = Attention(32, 4, 2), torch.randn(1, 12, 32)
    out = module(x, torch.tensor([0, 5, 5, 12], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat([module(x[:, :5]), module(x[:, 5:])], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["attention", "moe"])
def test_operators_compute_wide_whatever_autocast_is_around(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if kind == "attention":
        inputs = [torch.randn(2, 9, 4, 16, dtype=dtype, requires_grad=True) for _ in range(3)]

        def run() -> Tensor:
            return attention(*inputs, causal=True)
    else:
        x, w1, w3 = (torch.randn(size, dtype=dtype) for size in ((20, 16), (4, 24, 16), (4, 24, 16)))
        inputs = [x.requires_grad_(), w1.requires_grad_(), torch.randn(4, 16, 24, dtype=dtype, requires_grad=True), w3]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ids, weights = torch.randint(4, (20, 2)), torch.rand(20, 2, dtype=wide)

        def run() -> Tensor:
            return moe(*inputs, ids, weights)

    leaves = [x for x in inputs if x.requires_grad]
    out = run()
    wanted = [out, *torch.autograd.grad(out.sum(), leaves)]
    with torch.autocast("cpu", torch.bfloat16):
        out = run()
        found = [out, *torch.autograd.grad(out.sum(), leaves)]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("shape", [(1, 16, 5), (2, 16, 5)])
def test_moe_takes_any_strides(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = MoE(16, 24, experts=4, top_k=2), torch.randn(shape).transpose(1, 2)
    assert torch.equal(module(x), module(x.contiguous()))
    assert torch.equal(module(x[0, 0]), module(x[0, 0].contiguous()[None])[0])


def test_modules_on_other_devices_and_dtypes() -> None:
    with torch.device("meta"):
        block = Block()
    assert block(torch.empty(2, 5, 32, device="meta")).shape == (2, 5, 32)
    module, x = MoE(16, 24, experts=4, top_k=2).double(), torch.randn(9, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert torch.equal(module(x), module(x)) and module(x).dtype == torch.float64
    router = Router(8, 4, 1, balance=True).half()
    assert router.bias is not None and router.tokens_per_expert is not None
    assert (router.weight.dtype, router.bias.dtype) == (torch.float16, torch.float32)
    for _ in range(10):
        router(torch.randn(8192, 8, dtype=torch.float16))
    assert router.tokens_per_expert.sum() == 10 * 8192


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MoE(8, 8, experts=4, top_k=5), "top_k must be between 1 and 4, found 5"),
        (lambda: MoE(8, 8, experts=4, top_k=2, score_function="max"), "score_function must be one of"),
        (lambda: MoE(8, 8, experts=4, top_k=2, score_mode="both"), "score_mode must be one of .*, found 'both'"),
        (lambda: Router(8, 4, 2, groups=3), "groups must divide the 4 experts"),
        (lambda: Attention(8, 2, window=3), "window must be two non-negative sizes or None, .* found 3"),
        (lambda: Attention(8, 2)(torch.randn(8, 8)), r"x must be \[batch, seq, dim = 8\], found \[8, 8\]"),
        (lambda: Attention(8, 2)(torch.randn(1, 3, 9)), r"x must be \[batch, seq, dim = 8\], found \[1, 3, 9\]"),
        (lambda: Attention(8, 2, rope_theta=0.0), "rope_theta must be positive and finite, or None, found 0.0"),
        (
            lambda: Attention(8, 2, rope_theta=float("nan")),
            "rope_theta must be positive and finite, or None, found nan",
        ),
        (lambda: MoE(8, 0, 4, 2), "hidden_dim must be at least 1, found 0"),
        (lambda: Router(0, 4, 2), "dim must be at least 1, found 0"),
        (lambda: Router(8, -4, 1), "experts must be at least 1, found -4"),
        (lambda: Router(8, 4, 2, scale=float("inf")), "scale must be finite, found inf"),
        (lambda: Router(8, 4, 2)(torch.randn(3, 9)), r"tokens must be \[tokens, dim = 8\], found \[3, 9\]"),
        (lambda: MoE(8, 8, 4, 2)(torch.randn(3, 9)), r"x must be \[..., dim = 8\], found \[3, 9\]"),
        (lambda: MoE(8, 8, 4, 2)(torch.tensor(1.0)), r"x must be \[..., dim = 8\], found \[\]"),
    ],
)
def test_mistakes_are_named_when_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"heads": 4, "kv_heads": 3}, "heads must be a multiple of kv_heads, found heads = 4, kv_heads = 3"),
        ({"heads": 5}, "dim must be a multiple of heads, or head_dim be given, found 32 and 5"),
        ({"heads": 4, "head_dim": 7}, "head_dim must be positive, and even for rotary positions, found 7"),
    ],
)
def test_attention_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(32, **arguments)


def plain_moe(module: MoE, x: Tensor) -> Tensor:
    """Every token by every expert, then the chosen ones."""
    logits = x @ module.router.weight.T
    weights, ids = logits.softmax(-1).topk(module.router.top_k)
    hidden = F.silu(torch.einsum("...d,end->...en", x, module.w1)) * torch.einsum("...d,end->...en", x, module.w3)
    every = torch.einsum("...en,edn->...ed", hidden, module.w2)
    chosen = every.gather(-2, ids[..., None].expand(*ids.shape, x.shape[-1]))
    return (weights[..., None] * chosen).sum(-2)


@pytest.mark.parametrize("score_mode", ["combine", "activation"])
def test_moe(score_mode: str) -> None:
    torch.manual_seed(0)
    module, x = MoE(16, 24, experts=6, top_k=2, score_mode=score_mode), torch.randn(2, 9, 16, requires_grad=True)
    dout = torch.randn(2, 9, 16)
    leaves = [x, *module.parameters()]
    out, wanted = module(x), plain_moe(module, x)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(wanted, leaves, dout), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_router_balances() -> None:
    torch.manual_seed(0)
    router, tokens = Router(8, 4, 1, balance=True), torch.randn(256, 8) + torch.randn(8)
    spread = []
    for _ in range(100):
        counts = router(tokens).counts.sum(0).float()
        spread.append(float(counts.max() / counts.mean()))
        router.update_bias(0.02)
        assert router.tokens_per_expert is not None and not router.tokens_per_expert.any()
    assert spread[0] > 1.8 and spread[-1] < 1.25
    router.eval()(tokens)
    assert not router.tokens_per_expert.any()
    assert set(router.state_dict()) == {"weight", "bias"}


def test_router_without_balance() -> None:
    router = Router(8, 4, 2, score_function="sigmoid", renormalize=True)
    torch.testing.assert_close(router(torch.randn(5, 8)).weights.sum(1), torch.ones(5))
    assert set(router.state_dict()) == {"weight"}
    with pytest.raises(ValueError, match="update_bias needs a router with balance=True"):
        router.update_bias()


def test_router_is_exact_in_bfloat16() -> None:
    """bfloat16 scores would tie where float32 ones do not, and 256 experts would be chosen by their order."""
    torch.manual_seed(0)
    router, tokens = Router(64, 256, 8, dtype=torch.bfloat16), torch.randn(128, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        weights, ids, *_ = router(tokens)
    wanted = (tokens.double() @ router.weight.double().T).softmax(-1).topk(8)
    torch.testing.assert_close(weights.double(), wanted.values, rtol=1e-5, atol=1e-7)
    assert torch.equal(ids.long(), wanted.indices)


class Block(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.attention, self.moe = Attention(dim, 4, 2), MoE(dim, 24, experts=6, top_k=2, balance=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.moe(x)


def gradients(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    run(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


def test_checkpointing_compile_and_autocast() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 16, 32)
    wanted = gradients(block, block, x)
    assert len(wanted) == 8

    def same(got: dict[str, Tensor], tolerance: float) -> None:
        for name, want in wanted.items():
            scale = float(want.abs().max())
            torch.testing.assert_close(got[name] / scale, want / scale, rtol=0, atol=tolerance, msg=name)

    same(gradients(block, lambda y: checkpoint(block, y, use_reentrant=False), x), 1e-6)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    same(gradients(block, compiled, x), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        same(gradients(block, block, x), 0.1)


def fsdp_process() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(4, 16, 32)
    router = block.moe.router
    wanted = gradients(block, block, x)
    router.update_bias(0.1)
    bias = router.bias.clone()
    router.bias.zero_()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (block.attention, block.moe, block):
        fully_shard(part, mesh=mesh)
    got = gradients(block, block, x.chunk(mesh.size())[mesh.get_rank()])
    for name, want in wanted.items():
        torch.testing.assert_close(got[name].full_tensor(), want, rtol=1e-4, atol=1e-6)
    router.update_bias(0.1)
    assert torch.equal(router.bias, bias)  # the load of all processes, not of one


def test_fsdp() -> None:
    processes.run(fsdp_process)
