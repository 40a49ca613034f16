"""moe_permute, moe_combine and its gradient against plain loops: the reference on CPUs, the CUDA kernels on a GPU."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flashmoe_train.ops.library import COMPILED, has_kernel
from flashmoe_train.ops.moe import moe_combine, moe_permute

from .operators import CountOperators, assert_close_in_norm, assert_opcheck

ops = torch.ops.flashmoe
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [  # tokens, slots, spare rows, dim
    (23, 2, 0, 16),
    (23, 2, 5, 16),
    (5, 8, 3, 2048),
    (40, 1, 0, 7),
    (3, 9, 40, 264),
    (7, 16, 1, 1),
    (129, 3, 2, 520),
    (1, 1, 0, 8192),
    (0, 4, 3, 16),
    (4, 0, 3, 16),
    (4, 2, 0, 0),
]


def plan(tokens: int, slots: int, spare: int, device: str) -> tuple[Tensor, Tensor]:
    """(row_slot [R], slot_row [T, K]): a random one-to-one map that leaves every seventh slot without a row."""
    count = tokens * slots
    slot_row = torch.randperm(count + spare)[:count].to(torch.int32)
    slot_row[::7] = -1
    row_slot = torch.full((count + spare,), -1, dtype=torch.int32)
    used = (slot_row >= 0).nonzero().flatten()
    row_slot[slot_row[used].long()] = used.to(torch.int32)
    return row_slot.to(device), slot_row.view(tokens, slots).to(device)


def padded(x: Tensor, extra: int | None) -> Tensor:
    """The same values, with `extra` NaN elements between rows; or the first row for all."""
    if extra is None:
        return x[:1].expand_as(x) if len(x) else x
    wide = x.new_full((x.shape[0], x.shape[1] + extra), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def loop_combine(rows: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    out = torch.zeros(slot_row.shape[0], rows.shape[1], dtype=torch.float64)
    for t, own in enumerate(slot_row.tolist()):
        for k, row in enumerate(own):
            if row >= 0:
                out[t] += rows[row].cpu().double() * (1 if weights is None else weights[t, k].item())
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_loops(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    tokens, slots, spare, dim = shape
    row_slot, slot_row = plan(tokens, slots, spare, device)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(tokens, slots, dtype=sums, device=device)
    weights[slot_row < 0] = torch.nan  # of slots without a row: never used
    for extra in (0, 3, 8, None):  # elements between rows; None: all rows are one row, of stride 0
        rows, x, dout = (
            padded(torch.randn(n, dim, dtype=torch.float64).to(dtype).to(device), extra)
            for n in (len(row_slot), tokens, tokens)
        )
        if extra is not None:
            rows[row_slot < 0] = torch.nan

        permuted = moe_permute(x, row_slot, slot_row)
        wanted = torch.zeros_like(permuted)
        for row, slot in enumerate(row_slot.tolist()):
            if slot >= 0:
                wanted[row] = x[slot // slots]
        assert torch.equal(permuted, wanted)

        for factors in (weights, None):
            out = moe_combine(rows, slot_row, factors)
            assert out.dtype == dtype
            assert_close_in_norm("out", out, loop_combine(rows, slot_row, factors))

        drows, dweights = ops.moe_combine_backward(dout, rows, slot_row, weights)
        wanted_drows, wanted_dweights = torch.zeros(drows.shape).double(), torch.zeros(tokens, slots).double()
        for slot, row in enumerate(slot_row.flatten().tolist()):
            if row >= 0:
                t, k = divmod(slot, slots)
                wanted_drows[row] = dout[t].cpu().double() * weights[t, k].item()
                wanted_dweights[t, k] = (dout[t].double() @ rows[row].double()).cpu()
        assert_close_in_norm("drows", drows, wanted_drows)
        assert_close_in_norm("dweights", dweights, wanted_dweights)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_with_its_token(device: str) -> None:
    _, slot_row = plan(23, 4, 2, device)
    rows = torch.randn(94, 64, device=device)
    clean = moe_combine(rows, slot_row, None)
    rows[slot_row[3, 1]] = torch.nan
    others = torch.arange(23, device=device) != 3
    poisoned = moe_combine(rows, slot_row, None)
    assert poisoned[3].isnan().all() and torch.equal(poisoned[others], clean[others])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    row_slot, slot_row = plan(23, 4, 2, device)
    x, rows = (torch.randn(n, 16, device=device, requires_grad=True) for n in (23, 94))
    weights = torch.rand(23, 4, device=device, requires_grad=True)
    assert_opcheck(ops.moe_permute.default, (x, row_slot, slot_row))
    assert_opcheck(ops.moe_combine.default, (rows, slot_row, weights))
    assert_opcheck(ops.moe_combine.default, (rows, slot_row, None))
    detached = (torch.randn(23, 16, device=device), rows.detach(), slot_row, weights.detach())
    assert_opcheck(ops.moe_combine_backward.default, detached)


# ------------------------------------------------------------------------------------------------- the kernels on a GPU


@pytest.mark.gpu
def test_kernels_are_in() -> None:
    assert all(has_kernel(op, "cuda") for op in COMPILED)


@pytest.mark.gpu
def test_compiles_and_replays_in_a_cuda_graph() -> None:
    """mode="reduce-overhead" captures what it compiled; a replay reads the plan that is in memory then."""

    def function(rows: Tensor, slot_row: Tensor, weights: Tensor) -> Tensor:
        return moe_combine(rows * 2, slot_row, weights).sin()

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    rows, weights = torch.randn(1024, 256, device="cuda"), torch.rand(256, 4, device="cuda")
    for _ in range(4):
        slot_row = torch.randperm(1024, device="cuda", dtype=torch.int32).view(256, 4)
        torch.testing.assert_close(compiled(rows, slot_row, weights), function(rows, slot_row, weights))
    with CountOperators() as counter:
        function(rows, slot_row, weights)
    assert counter.counts == {"moe_combine": 1}


@pytest.mark.gpu
def test_side_stream_and_no_sync() -> None:
    row_slot, slot_row = plan(512, 8, 0, "cuda")
    rows, weights = torch.randn(4096, 1024, device="cuda"), torch.rand(512, 8, device="cuda")
    wanted = moe_combine(rows * 3, slot_row, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)  # the rows are ready late: a kernel on another stream would not see them
            found = moe_combine(rows * 3, slot_row, weights)
            moe_permute(found, row_slot, slot_row)
            ops.moe_combine_backward(found, rows, slot_row, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_repeats_bitwise() -> None:
    _, slot_row = plan(2048, 8, 5, "cuda")
    rows = torch.randn(2048 * 8 + 5, 2048, device="cuda", dtype=torch.bfloat16)
    dout, weights = torch.randn_like(rows[:2048]), torch.rand(2048, 8, device="cuda")
    first = (moe_combine(rows, slot_row, weights), *ops.moe_combine_backward(dout, rows, slot_row, weights))
    for _ in range(5):
        again = (moe_combine(rows, slot_row, weights), *ops.moe_combine_backward(dout, rows, slot_row, weights))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    tokens, dim = 150_001, 7168
    rows = torch.empty(2 * tokens, dim, device="cuda", dtype=torch.bfloat16)
    rows[-1], rows[-2] = 1, 2
    slot_row = torch.full((tokens, 2), -1, dtype=torch.int32, device="cuda")
    slot_row[-1, 0], slot_row[-1, 1] = 2 * tokens - 1, 2 * tokens - 2
    out = moe_combine(rows, slot_row, None)
    assert (out[-1] == 3).all() and (out[:-1] == 0).all()
    drows, _ = ops.moe_combine_backward(out, rows, slot_row, torch.ones(tokens, 2, device="cuda"))
    assert (drows[-2:] == 3).all() and (drows[:-2] == 0).all()
    row_slot = torch.full((2 * tokens,), -1, dtype=torch.int32, device="cuda")
    row_slot[-1], row_slot[-2] = 2 * tokens - 2, 2 * tokens - 1
    permuted = moe_permute(out, row_slot, slot_row)
    assert (permuted[-2:] == 3).all() and (permuted[:-2] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["x", "rows"])
def test_first_tensor_that_is_not_on_the_gpu(name: str) -> None:
    """The operators are called directly: the others being on the GPU is enough for the kernels to be chosen."""
    x, index = torch.ones(4, 16), torch.zeros(4, 2, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=f"{name} must be on a CUDA device"):
        ops.moe_permute(x, index[:, 0], index) if name == "x" else ops.moe_combine(x, index, None)


@pytest.mark.gpu
def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    _, slot_row = plan(23, 2, 0, "cuda:1")
    rows = torch.randn(46, 16, device="cuda:1")
    torch.testing.assert_close(
        moe_combine(rows, slot_row, None).cpu(), moe_combine(rows.cpu(), slot_row.cpu(), None), rtol=1e-5, atol=1e-5
    )


INDEX_ERRORS = [  # x [8, 16]; a map i1 of 9 rows of nobody; a map i2 of 8 tokens, two slots each, all in row 0
    ("slot_row names a row that rows does not have", "moe_combine(x, i2 + 8, None)"),
    ("slot_row names a row that rows does not have", "ops.moe_combine_backward(x, x, i2 + 8, w)"),
    ("slot_row must not name a row twice", "ops.moe_combine_backward(x, x, i2, w)"),
    ("slot_row names a row that row_slot does not have", "moe_permute(x, i1, i2 + 9)"),
    ("slot_row names a row that row_slot does not have", "moe_permute(x, i1[:0], i2)"),
    ("row_slot names a slot that slot_row does not have", "moe_permute(x, i1 + 17, i2 - 1)"),
    ("slot_row must be the inverse of row_slot", "i1[0] = 0; moe_permute(x, i1, i2)"),  # row 0 for all slots
    ("slot_row must be the inverse of row_slot", "i1[3] = 0; moe_permute(x, i1, i2 - 1)"),  # a row that nobody writes
    ("slot_row must be the inverse of row_slot", "x.requires_grad_(); moe_combine(x, i2, None).sum().backward()"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("text, call", INDEX_ERRORS)
def test_wrong_index_value_is_asserted_on_the_device(text: str, call: str) -> None:
    program = (
        "import torch\nfrom flashmoe_train.ops.moe import moe_combine, moe_permute\nops = torch.ops.flashmoe\n"
        "x, w = torch.ones(8, 16, device='cuda'), torch.ones(8, 2, device='cuda')\n"
        "i1, i2 = torch.full((9,), -1, dtype=torch.int32, device='cuda'), torch.zeros_like(w, dtype=torch.int32)\n"
        f"{call}\ntorch.cuda.synchronize()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 1  # an exception, not a crash of the interpreter
    assert text in found.stdout + found.stderr
    assert "device-side assert" in found.stderr


# --------------------------------------------------------------------------------------------------------- wrong input


def wrong_arguments(device: str) -> list[tuple]:
    x, index = torch.randn(4, 16, device=device), torch.zeros(4, 2, dtype=torch.int32, device=device)
    weights = torch.ones(4, 2, device=device)
    backward = (x, x, index, weights)
    return [
        (ops.moe_permute, (x[0], index[0], index), "x must have 2 dimensions, found \\[16\\]"),
        (ops.moe_permute, (x, index, index), "row_slot must have 1 dimension"),
        (ops.moe_permute, (x, index[0].long(), index), "row_slot must be int32"),
        (ops.moe_permute, (x, index[0], index[:3]), "slot_row must have one row per token of x, found \\[3, 2\\]"),
        (ops.moe_permute, (x, index[0].to("meta"), index), "row_slot must be on"),
        (ops.moe_combine, (x.t(), index, None), "rows must have a contiguous last dimension"),
        (ops.moe_combine, (x, index.float(), None), "slot_row must be int32"),
        (ops.moe_combine, (x, index, weights[:3]), "weights must be \\[4, 2\\], found \\[3, 2\\]"),
        (ops.moe_combine, (x, index, weights.double()), "weights must be .*[fF]loat"),
        (ops.moe_combine, (x, index, weights.to("meta")), "weights must be on"),
        (ops.moe_combine_backward, (x[:, :8], *backward[1:]), "dout must be \\[4, 16\\]"),
        (ops.moe_combine_backward, (x.double(), *backward[1:]), "dout must "),
        (ops.moe_combine_backward, (x.t().contiguous().t(), *backward[1:]), "dout must have a contiguous last"),
    ]


def test_maps_are_one_to_one() -> None:
    """Checked where reading them makes nobody wait."""
    twice = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    x, rows, weights = torch.randn(2, 4), torch.randn(3, 4), torch.ones(2, 2)
    for call in (
        lambda: moe_combine(rows, twice, weights),
        lambda: moe_combine(rows, twice, None),
        lambda: ops.moe_combine_backward(x, rows, twice, weights),
    ):
        with pytest.raises(ValueError, match="slot_row must not name a row twice"):
            call()
    row_slot = torch.tensor([0, 1, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="slot_row must be the inverse of row_slot"):
        moe_permute(x, row_slot, twice)
    with pytest.raises(ValueError, match="slot_row names a row that row_slot does not have: 2 of 2"):
        moe_permute(x, row_slot[:2], twice)
    with pytest.raises(ValueError, match="slot_row names a row that rows does not have: 2 of 2"):
        moe_combine(rows[:2], twice, None)
    with pytest.raises(ValueError, match="slot_row must be the inverse of row_slot"):
        moe_permute(x[:0], row_slot, twice[:0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(len(wrong_arguments("cpu"))))
def test_wrong_argument(number: int, device: str) -> None:
    """Called directly too: by whoever goes past the public functions."""
    operator, arguments, text = wrong_arguments(device)[number]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        operator(*arguments)
