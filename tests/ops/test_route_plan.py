"""route_plan against a plain loop: the reference on CPUs, the CUDA kernel on a GPU."""

import pytest
import torch
from torch import Tensor

from flashmoe_train.ops.moe import route_plan

from .operators import CountOperators, assert_opcheck, captured, chooser

ops = torch.ops.flashmoe
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [  # tokens, slots, experts
    (0, 4, 3),
    (1, 1, 1),
    (23, 2, 5),
    (7, 16, 16),
    (40, 8, 64),
    (129, 3, 512),
    (1025, 8, 257),
    (1024, 8, 256),
    (700, 4, 4096),
    (1500, 6, 8192),
]


def loop(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = ids.reshape(-1).tolist()
    order = sorted((e, slot) for slot, e in enumerate(flat) if 0 <= e < experts)
    offsets, row_slot, slot_row = [0] * (experts + 1), [-1] * len(flat), [-1] * len(flat)
    for row, (e, slot) in enumerate(order):
        offsets[e + 1] += 1
        row_slot[row], slot_row[slot] = slot, row
    totals = torch.tensor(offsets).cumsum(0)
    return totals.int(), torch.tensor(row_slot).int(), torch.tensor(slot_row).int().view(ids.shape)


def assert_plan(ids: Tensor, experts: int, wanted: tuple[Tensor, ...] | None = None) -> None:
    found = route_plan(ids, experts)
    for name, x, y in zip(("offsets", "row_slot", "slot_row"), found, wanted or loop(ids, experts), strict=True):
        assert x.dtype == torch.int32 and x.is_contiguous() and x.device == ids.device
        assert torch.equal(x.cpu(), y.cpu()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_loop(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    tokens, slots, experts = shape
    even = torch.arange(tokens * slots).view(tokens, slots) % experts
    for ids in (
        torch.randint(experts, (tokens, slots)),
        torch.randint(-3, experts + 3, (tokens, slots)),  # some out of range
        torch.full((tokens, slots), experts // 2),
        torch.full((tokens, slots), -1),
        torch.full((tokens, slots), experts),
        even,
        even.flip(0),
        even[:, :1].expand(tokens, slots),  # duplicates in a token, and a stride of 0
    ):
        assert_plan(ids.to(dtype).to(device), experts)


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    for dtype in (torch.int32, torch.int64):
        wide = torch.randint(-1, 9, (50, 12), device=device, dtype=dtype)
        for ids in (wide[:, 3:7], wide[::2], wide.t(), wide[:, ::3], wide[:, 5:6]):
            assert_plan(ids, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_int64_ids_that_no_int32_holds(device: str) -> None:
    ids = torch.tensor([[2**32 + 1, 1], [-(2**32) + 1, 0], [2**63 - 1, -(2**63)]], device=device)
    assert_plan(ids, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    for dtype in (torch.int32, torch.int64):
        ids = torch.randint(-1, 6, (23, 2), device=device, dtype=dtype)
        assert_opcheck(ops.route_plan.default, (ids, 5))


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_argument(device: str) -> None:
    ids = torch.zeros(4, 2, dtype=torch.int32, device=device)
    for arguments, text in (
        ((ids[0], 3), r"ids must be \[tokens, experts per token\], found \[2\]"),
        ((ids[:, :0], 3), r"ids must be \[tokens, experts per token\], found \[4, 0\]"),
        ((ids.float(), 3), "ids must be int32 or int64, found"),
        ((ids, 0), "num_experts must be at least 1, found 0"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
            route_plan(*arguments)


# -------------------------------------------------------------------------------------------------- the kernel on a GPU


@pytest.mark.gpu
def test_random_cases() -> None:
    """Sizes around those of warps, tiles, chunks and of the whole grid; from even to one expert for all."""
    choose = chooser(0)
    for _ in range(400):
        experts = choose(1, 2, 3, 8, 31, 64, 128, 256, 257, 511, 1024, 2048, 4096)
        slots = choose(1, 2, 3, 6, 8, 16)
        most = choose(3, 40, 1030, 4100, 8200, 20_000, 100_000) + choose(-1, 0, 1, 17)
        skew, skipped = choose(0, 1, 3, 20), choose(0.0, 0.01, 0.5)
        ids = (torch.rand(-(-most // slots), slots, device="cuda") ** (1 + skew) * experts).to(torch.int32)
        ids = torch.where(torch.rand_like(ids, dtype=torch.float32) < skipped, choose(-1, experts, 2**31 - 1), ids)
        ids = ids.to(choose(torch.int32, torch.int64))
        on_cpu = route_plan(ids.cpu(), experts)
        assert_plan(ids, experts, on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, slots", [(32768, 8), (131_073, 8), (3_000_001, 7)], ids=str)
def test_large(tokens: int, slots: int) -> None:
    """More slots than one round of the largest grid holds, too."""
    for power in (1, 4):
        ids = (torch.rand(tokens, slots, device="cuda") ** power * 256).to(torch.int32)
        assert_plan(ids, 256, route_plan(ids.cpu(), 256))


@pytest.mark.gpu
def test_repeats_bitwise_without_sync() -> None:
    ids = torch.randint(-1, 300, (32768, 8), device="cuda", dtype=torch.int32)
    first = route_plan(ids, 256)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [route_plan(ids, 256) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for plan in again for a, b in zip(first, plan, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [100, 8192])
def test_replays_in_a_cuda_graph(tokens: int) -> None:
    ids = torch.zeros(tokens, 8, device="cuda", dtype=torch.int32)
    graph, found = captured(lambda: route_plan(ids, 64))
    for _ in range(3):
        ids.copy_(torch.randint(-1, 66, ids.shape))
        graph.replay()
        for x, y in zip(found, route_plan(ids.cpu(), 64), strict=True):
            assert torch.equal(x.cpu(), y)


@pytest.mark.gpu
def test_compiles() -> None:
    compiled = torch.compile(lambda ids: route_plan(ids * 2, 64)[2] + 1, fullgraph=True)
    for tokens in (5, 300, 2000):
        ids = torch.randint(32, (tokens, 4), device="cuda")
        assert torch.equal(compiled(ids), route_plan(ids * 2, 64).slot_row + 1)
    with CountOperators() as counter:
        route_plan(ids, 64)
    assert counter.counts == {"route_plan": 1}


@pytest.mark.gpu
def test_more_experts_than_the_kernel_takes() -> None:
    with pytest.raises(RuntimeError, match="num_experts must be at most 8192 on a GPU, found 8193"):
        route_plan(torch.zeros(4, 2, dtype=torch.int32, device="cuda"), 8193)
