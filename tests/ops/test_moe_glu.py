"""moe_glu and its gradient against PyTorch's own in float64: the reference on CPUs, the CUDA kernels on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe_train.ops.moe.glu import moe_glu

from .operators import CountOperators, assert_close_in_norm, assert_opcheck, captured, chooser

ops = torch.ops.flashmoe
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [  # rows, of which belong to somebody, n
    (46, 46, 16),
    (46, 40, 768),
    (9, 0, 24),
    (40, 33, 7),
    (7, 7, 1),
    (129, 100, 520),
    (3, 2, 8192),
    (1, 1, 8),
    (0, 0, 16),
    (4, 3, 0),
]


def draw(rows: int, used: int, dim: int, dtype: torch.dtype, device: str, layout: str) -> tuple[Tensor, ...]:
    """dout, gate, up, offsets, row_weight: NaN in rows of nobody, and between rows."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if layout == "halves":
        gate, up = torch.randn(rows, 2 * dim, dtype=torch.float64).chunk(2, 1)
    else:
        gate, up = torch.randn(2, rows, dim, dtype=torch.float64)
    h = torch.cat([gate, up], 1).to(dtype).to(device)
    dout = torch.randn(rows, dim, dtype=torch.float64).to(dtype).to(device)
    weight = torch.rand(rows, dtype=wide, device=device)
    for x in (dout, h, weight):
        x[used:] = torch.nan
    gate, up = h.chunk(2, 1) if dim else (h, h)
    if layout == "apart":
        gate, up = gate.contiguous(), up.contiguous()
    elif layout == "padded":
        dout = F.pad(dout, (0, 3), value=torch.nan)[:, :dim]
        gate = F.pad(gate, (1, 2), value=torch.nan)[:, 1 : 1 + dim]
    elif layout == "one row" and rows == used:
        gate = gate[:1].expand_as(gate)
    offsets = torch.tensor([0, used // 2, used], dtype=torch.int32, device=device)
    return dout, gate, up, offsets, weight


def oracle(
    dout: Tensor, gate: Tensor, up: Tensor, offsets: Tensor, row_weight: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out and the gradients in float64, by autograd over the rows that belong to somebody; zeros behind them."""
    rows, used = len(gate), int(offsets[-1])
    inputs = [x.detach().cpu().double()[:used].requires_grad_() for x in (gate, up)]
    weight = torch.ones(used).double() if row_weight is None else row_weight.detach().cpu().double()[:used]
    inputs.append(weight.requires_grad_())
    out = F.silu(inputs[0]) * inputs[1] * inputs[2][:, None]
    gradients = torch.autograd.grad(out, inputs, dout.cpu().double()[:used])
    grown = [torch.cat([x, x.new_zeros(rows - used, *x.shape[1:])]) for x in (out.detach(), *gradients)]
    return grown[0], tuple(grown[1:])


def assert_glu(arguments: tuple[Tensor, ...], weighted: bool) -> None:
    dout, gate, up, offsets, weight = arguments
    row_weight = weight if weighted else None
    wanted, gradients = oracle(dout, gate, up, offsets, row_weight)
    out = moe_glu(gate, up, offsets, row_weight)
    assert out.dtype == gate.dtype and out.is_contiguous()
    found = ops.moe_glu_backward(dout, gate, up, offsets, row_weight)
    assert_close_in_norm("out", out, wanted)
    assert_close_in_norm("dgate", found[0], gradients[0])
    assert_close_in_norm("dup", found[1], gradients[1])
    assert found[2].dtype == weight.dtype
    if weighted:
        assert_close_in_norm("drow_weight", found[2], gradients[2])
    else:
        assert found[2].shape == (0,)
    used = int(offsets[-1])
    assert all((x[used:] == 0).all() for x in (out, found[0], found[1], found[2]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    for layout in ("apart", "halves", "padded", "one row"):
        for weighted in (True, False):
            assert_glu(draw(*shape, dtype, device, layout), weighted)


@pytest.mark.parametrize("device", DEVICES)
def test_large_gates(device: str) -> None:
    """exp overflows, the result does not; a NaN or an infinity stays where it is."""
    values = torch.tensor([-1e4, -200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0, 1e4], device=device)
    gate, up = values[None].repeat(4, 1), torch.full((4, 9), 2.0, device=device)
    gate[2, 3], up[3, 4] = torch.nan, torch.inf
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    out = moe_glu(gate, up, offsets, None)
    wanted = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-30, equal_nan=True)
    dgate, dup, _ = ops.moe_glu_backward(torch.ones_like(gate), gate, up, offsets, None)
    assert dgate[:2].isfinite().all() and dup[:2].isfinite().all()
    assert dup[2].isnan().sum() == 1 and dgate[2].isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_autograd(weighted: bool, device: str) -> None:
    _, gate, up, offsets, weight = draw(6, 4, 8, torch.float64, device, "halves")
    inputs = [x.nan_to_num().requires_grad_() for x in ((gate, up, weight) if weighted else (gate, up))]

    def function(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
        return moe_glu(gate, up, offsets, weight)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool, device: str) -> None:
    dout, gate, up, offsets, weight = (x.nan_to_num() for x in draw(23, 20, 16, torch.float32, device, "halves"))
    row_weight = weight.clone().requires_grad_() if weighted else None
    arguments = gate.detach().requires_grad_(), up.detach().requires_grad_(), offsets, row_weight
    assert_opcheck(ops.moe_glu.default, arguments)
    assert_opcheck(ops.moe_glu_backward.default, (dout, gate, up, offsets, weight if weighted else None))


@pytest.mark.gpu
def test_random_cases() -> None:
    choose = chooser(0)
    for _ in range(300):
        rows = choose(1, 2, 7, 8, 9, 31, 64, 257)
        used = choose(*range(rows + 1))
        dim = choose(1, 4, 8, 12, 64, 72, 250, 256, 264, 1024)
        layout = choose("apart", "halves", "padded", "one row")
        assert_glu(draw(rows, used, dim, choose(*DTYPES), "cuda", layout), choose(True, False))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    rows, dim = 150_001, 14336
    gate = torch.ones(rows, dim, device="cuda", dtype=torch.bfloat16)
    gate[-1] = 2
    offsets = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    out = moe_glu(gate, gate, offsets, None)
    wanted = (F.silu(gate[-2:].float()) * gate[-2:].float()).bfloat16()
    assert torch.equal(out[-2:], wanted)
    del out
    dgate, dup, _ = ops.moe_glu_backward(gate, gate, gate, offsets, None)
    assert (dgate[-1] == dgate[-1, 0]).all() and dgate[-1, 0] != dgate[-2, 0] and (dup[-2] == dup[0]).all()


@pytest.mark.gpu
def test_compiles_replays_and_repeats() -> None:
    dout, gate, up, offsets, weight = (x.nan_to_num() for x in draw(512, 400, 256, torch.bfloat16, "cuda", "halves"))

    def run() -> tuple[Tensor, ...]:
        return moe_glu(gate, up, offsets, weight), *ops.moe_glu_backward(dout, gate, up, offsets, weight)

    compiled = torch.compile(lambda gate: moe_glu(gate * 2, up, offsets, weight).sin(), fullgraph=True)
    torch.testing.assert_close(compiled(gate), moe_glu(gate * 2, up, offsets, weight).sin())
    graph, found = captured(run)
    for used in (0, 512, 100):
        offsets.copy_(torch.tensor([0, used // 2, used]))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))
    with CountOperators() as counter:
        run()
    assert counter.counts == {"moe_glu": 1, "moe_glu_backward": 1}


def wrong_arguments(device: str) -> list[tuple]:
    x, offsets = torch.randn(4, 16, device=device), torch.tensor([0, 4], dtype=torch.int32, device=device)
    weight = torch.ones(4, device=device)
    return [
        (ops.moe_glu, (x[0], x, offsets, None), "gate must have 2 dimensions"),
        (ops.moe_glu, (x.t(), x, offsets, None), "gate must have a contiguous last dimension"),
        (ops.moe_glu, (x, x[:3], offsets, None), r"up must be \[4, 16\]"),
        (ops.moe_glu, (x, x.double(), offsets, None), r"up must be \[4, 16\] in the dtype of gate"),
        (ops.moe_glu, (x, x.to("meta"), offsets, None), "up must be on"),
        (ops.moe_glu, (x, x, offsets.long(), None), "offsets must be int32"),
        (ops.moe_glu, (x, x, offsets[:0], None), r"offsets must be \[experts \+ 1\], found \[0\]"),
        (ops.moe_glu, (x, x, offsets, weight[:3]), r"row_weight must be \[4\], found \[3\]"),
        (ops.moe_glu, (x, x, offsets, weight.double()), "row_weight must be .*[fF]loat"),
        (ops.moe_glu_backward, (x[:, :8], x, x, offsets, None), r"dout must be \[4, 16\]"),
        (ops.moe_glu_backward, (x.double(), x, x, offsets, None), r"dout must be \[4, 16\] in the dtype of gate"),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(len(wrong_arguments("cpu"))))
def test_wrong_argument(number: int, device: str) -> None:
    operator, arguments, text = wrong_arguments(device)[number]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        operator(*arguments)
