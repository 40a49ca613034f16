"""csrc/hopper on a GPU: every wrapper of the hardware against exact integers that the CPU computes.

tests/csrc/hopper has the kernels and their C functions. Where an element of a tile belongs is computed
here once more, from the layout's definition.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "build/libflashmoe_hopper_test.so"
BUILD = "make self-test"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Library:
    """Its functions, which raise what goes wrong."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.hopper_error.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: Any) -> None:
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        if status := getattr(self.functions, f"hopper_{name}")(*converted):
            raise RuntimeError(f"hopper_{name}: {self.functions.hopper_error().decode()} ({status})")


@pytest.fixture(scope="module")
def library() -> Library:
    if not LIBRARY.exists():
        if not shutil.which(os.environ.get("CUDACXX") or "nvcc"):
            pytest.skip("there is no nvcc to build it with")
        pytest.fail(f"{LIBRARY} is not built: {BUILD}")
    return Library(LIBRARY)


def integers(*shape: int, limit: int = 4) -> Tensor:
    return torch.randint(-limit, limit + 1, shape).float()


# --- Tiles: 64-column slabs of 128-byte rows, 16-byte chunks exchanged within eight rows.

TILE_BYTES = 64 * 1024


def image(tile: Tensor) -> Tensor:
    """The bytes of shared memory, as 16-bit integers, with this 2-byte tile at the front and ones elsewhere."""
    rows, columns = tile.shape
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    chunk = (column // 8 % 8) ^ (row % 8)
    place = (column // 64 * rows + row) * 64 + chunk * 8 + column % 8
    result = torch.full((TILE_BYTES // 2,), -1, dtype=torch.int16)
    result[place] = tile.view(torch.int16)
    return result


def empty_image() -> Tensor:
    return torch.zeros(TILE_BYTES // 2, dtype=torch.int16, device="cuda")


# --- Products

K_MAJOR, MN_MAJOR, REGISTERS = 0, 1, 2
OPERANDS = [(K_MAJOR, K_MAJOR), (K_MAJOR, MN_MAJOR), (MN_MAJOR, K_MAJOR), (MN_MAJOR, MN_MAJOR)]
OPERANDS += [(REGISTERS, K_MAJOR), (REGISTERS, MN_MAJOR)]
M = K = 128


class ProductParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "d")),
        *((name, ctypes.c_uint64) for name in ("flip_a", "flip_b")),
        ("unswizzled", ctypes.c_bool),
    )


def is_right(library: Library, dtype: str, n: int, a: int, b: int, **changes: int) -> bool:
    left, right = integers(M, K), integers(K, n)
    d = torch.full((M, n), float("nan"), device="cuda")
    a_source = (left.T if a == MN_MAJOR else left).to("cuda", DTYPES[dtype]).contiguous()
    b_source = (right.T if b == K_MAJOR else right).to("cuda", DTYPES[dtype]).contiguous()
    params = ProductParams(a_source.data_ptr(), b_source.data_ptr(), d.data_ptr(), **changes)
    library(f"product_{dtype}", ctypes.byref(params), n, a, b)
    return torch.equal(d.cpu(), left @ right)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (32, 64, 80, 96, 112, 128, 176, 192, 256))
@pytest.mark.parametrize(("a", "b"), OPERANDS)
def test_product(library: Library, dtype: str, n: int, a: int, b: int) -> None:
    assert is_right(library, dtype, n, a, b)


class Flip(NamedTuple):
    """Bits of a descriptor: whether the product notices them."""

    a: int
    b: int
    changes: dict[str, int]
    noticed: bool


def flips() -> dict[str, Flip]:
    fields = {
        "address": 1 << 0,  # 16 bytes
        "leading": 1 << 22,  # 1024 bytes
        "stride": 1 << 38,  # from 1024 bytes to none
        "base offset": 1 << 49,
        "layout none": 1 << 62,
        "layout 32": 2 << 62,
        "layout 64": 3 << 62,
    }
    operands = {
        "A K-major": ("flip_a", K_MAJOR, K_MAJOR),
        "B K-major": ("flip_b", K_MAJOR, K_MAJOR),
        "A MN-major": ("flip_a", MN_MAJOR, MN_MAJOR),
        "B MN-major": ("flip_b", MN_MAJOR, MN_MAJOR),
        "B MN-major, A in registers": ("flip_b", REGISTERS, MN_MAJOR),
    }
    result = {}
    for field, bits in fields.items():
        for operand, (which, a, b) in operands.items():
            # From slab to slab: only an MN-major operand of more than 64 has several, and M is 64.
            noticed = field != "leading" or operand.startswith("B MN-major")
            result[f"{field} of {operand}"] = Flip(a, b, {which: bits}, noticed)
    for a, b in OPERANDS:
        result[f"no swizzle {a} {b}"] = Flip(a, b, {"unswizzled": 1}, True)
        result[f"nothing {a} {b}"] = Flip(a, b, {}, False)
    return result


FLIPS = flips()


@pytest.fixture(scope="module")
def flipped(library: Library) -> dict[str, str]:
    return outcomes()


def outcomes() -> dict[str, str]:
    """What came of each flip: right, wrong or an error's text. Elsewhere, since an error is the end of a process."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def try_flips() -> None:
    """Prints them all. Each process goes on where an error ended the one before; CUDA begins in none but these."""
    left = list(FLIPS)
    while left:
        reader, writer = os.pipe()
        if os.fork() == 0:
            with os.fdopen(writer, "w") as found:
                library = Library(LIBRARY)
                for name in left:
                    flip = FLIPS[name]
                    try:
                        right = is_right(library, "bf16", 128, flip.a, flip.b, **flip.changes)
                    except RuntimeError as error:
                        found.write(f"{name}: {error}\n")
                        break
                    found.write(f"{name}: {'right' if right else 'wrong'}\n")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            results = lines.read().splitlines()
        os.wait()
        assert results, "nothing came of " + left[0]
        print(*results, sep="\n")
        left = left[len(results) :]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLIPS)
def test_wrong_descriptor_gives_a_wrong_product(flipped: dict[str, str], name: str) -> None:
    """Every field of every kind of descriptor matters, and the tests above notice; or it is known not to matter."""
    assert (flipped[name] != "right") == FLIPS[name].noticed, flipped[name]


# --- TMA


class MapArguments(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("element_type", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        *((name, ctypes.c_int64 * 4) for name in ("size", "box", "stride", "at")),
        ("keep", ctypes.c_int64),
    )


class Box(NamedTuple):
    """A tensor, and a box of it. As in PyTorch the innermost dimension is the last; coordinates may be anywhere."""

    shape: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    keep: int = 0

    def tensor(self) -> tuple[Tensor, Tensor]:
        """Random, in a larger one that is NaN elsewhere; that one too."""
        surroundings = torch.full([size + 8 for size in self.shape], float("nan"), dtype=self.dtype)
        inside = surroundings[tuple(slice(0, size) for size in self.shape)]
        inside.copy_(integers(*self.shape, limit=100))
        surroundings = surroundings.cuda()
        return surroundings[tuple(slice(0, size) for size in self.shape)], surroundings

    def arguments(self, x: Tensor) -> MapArguments:
        def four(numbers: Sequence[int]) -> Any:
            return (ctypes.c_int64 * 4)(*reversed(numbers))

        strides = [2 * stride for stride in x.stride()]
        return MapArguments(
            x.data_ptr(), self.dtype == torch.float16, x.dim(), four(x.shape), four(self.box), four(strides),
            four(self.at), self.keep,
        )  # fmt: skip

    def places(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of every element of the box in the tensor, as far as there is one; and whether there is one."""
        ranges = [torch.arange(at, at + size) for at, size in zip(self.at, self.box, strict=True)]
        grid = torch.meshgrid(*ranges, indexing="ij")
        inside = torch.ones(self.box, dtype=torch.bool)
        for i, size in zip(grid, self.shape, strict=True):
            inside &= (i >= 0) & (i < size)
        return tuple(i.clamp(0, size - 1) for i, size in zip(grid, self.shape, strict=True)), inside


BOXES = {
    "2-D inside": Box((100, 192), (32, 64), (32, 64)),
    "2-D fp16": Box((100, 192), (32, 64), (32, 64), torch.float16),
    "2-D largest": Box((300, 64), (256, 64), (20, 0), keep=1),
    "2-D rows end": Box((100, 192), (32, 64), (80, 128), keep=2),
    "2-D columns end": Box((40, 136), (24, 64), (8, 128)),
    "2-D before": Box((40, 136), (24, 64), (-5, -16)),
    "2-D all outside": Box((40, 128), (24, 64), (40, 0)),
    "3-D inside": Box((5, 40, 128), (1, 16, 64), (3, 8, 64), keep=2),
    "3-D rows end": Box((5, 40, 128), (1, 48, 64), (4, 8, 0)),
    "3-D before": Box((5, 40, 128), (1, 48, 64), (0, -20, 0)),
    "3-D all outside": Box((5, 40, 128), (1, 48, 64), (5, 0, 0), keep=1),
    "3-D deep": Box((5, 40, 128), (3, 16, 64), (3, 32, 64)),
    "4-D inside": Box((2, 50, 3, 128), (1, 16, 1, 64), (1, 16, 2, 64)),
    "4-D rows end": Box((2, 50, 3, 128), (1, 32, 1, 64), (1, 32, 1, 0), keep=2),
    "4-D before": Box((2, 50, 3, 128), (1, 32, 1, 64), (0, -9, 1, 0), keep=1),
    "4-D many heads": Box((2, 50, 3, 128), (2, 8, 4, 64), (0, 44, 0, 64), torch.float16),
    "4-D one batch": Box((1, 50, 3, 128), (1, 32, 1, 64), (0, 32, 1, 0)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_tma_load(library: Library, box: Box) -> None:
    x, _ = box.tensor()
    found = empty_image()
    library("load", ctypes.byref(box.arguments(x)), found)
    index, inside = box.places()
    expected = torch.where(inside, x.cpu()[index], torch.zeros((), dtype=box.dtype))
    assert torch.equal(found.cpu(), image(expected.reshape(-1, 64)))


STORED = {name: box for name, box in BOXES.items() if min(box.at) >= 0}  # a store may not begin before the tensor


@pytest.mark.gpu
@pytest.mark.parametrize("box", STORED.values(), ids=STORED)
def test_tma_store(library: Library, box: Box) -> None:
    """What of the box lies in the tensor, and not a byte around it."""
    x, surroundings = box.tensor()
    expected = surroundings.cpu().clone()
    tile = integers(*box.box, limit=100).to(box.dtype)
    library("store", ctypes.byref(box.arguments(x)), image(tile.reshape(-1, 64)).cuda())
    index, inside = box.places()
    expected[tuple(i[inside] for i in index)] = tile[inside]
    assert torch.equal(surroundings.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.gpu
def test_bulk_load(library: Library) -> None:
    source = torch.randint(-1000, 1000, (4096,), dtype=torch.int16)
    for begin, count in ((0, 8), (8, 256), (16, 4000)):
        found = empty_image()
        library("bulk_load", source.cuda()[begin:], ctypes.c_uint32(2 * count), found)
        expected = torch.full_like(found.cpu(), -1)
        expected[:count] = source[begin : begin + count]
        assert torch.equal(found.cpu(), expected)


def bad_maps(address: int) -> dict[str, MapArguments]:
    """What a tensor map refuses, by what it says. `address` is a multiple of 16, and is not read."""

    def arguments(base: int = address, rank: int = 3, **changes: tuple[int, ...]) -> MapArguments:
        values = {"size": (128, 40, 5), "box": (64, 32, 1), "stride": (2, 256, 10240)} | changes
        lists = [(ctypes.c_int64 * 4)(*values[name]) for name in ("size", "box", "stride")]
        return MapArguments(base, 0, rank, *lists)

    return {
        "there must be 2 to 4 dimensions, found 1": arguments(rank=1),
        "there must be a base address": arguments(base=0),
        "base address must be a multiple of 16 bytes, found 8": arguments(base=address + 8),
        "dimension 1 must not be empty: return before the launch, found 0": arguments(size=(128, 0, 5)),
        "dimension 2 must have at most 2^32 elements, found 4294967297": arguments(size=(128, 40, 2**32 + 1)),
        "dimension 1's box must have 1 to 256 elements, found 257": arguments(box=(64, 257, 1)),
        "dimension 2's box must have 1 to 256 elements, found 0": arguments(box=(64, 32, 0)),
        "dimension 0's box must be 128 bytes wide like a slab, found 64": arguments(box=(32, 32, 1)),
        "dimension 0's stride must be an element of 2 bytes, found 4": arguments(stride=(4, 256, 10240)),
        "dimension 2's stride must be positive: copy an expanded view, found 0": arguments(stride=(2, 256, 0)),
        "dimension 1's stride must be a multiple of 16 bytes, found 264": arguments(stride=(2, 264, 10560)),
        f"dimension 2's stride must be below 2^40 bytes, found {2**40}": arguments(stride=(2, 256, 2**40)),
    }


# The checks need no GPU: test_library.py has all of them. This one is about the driver.
@pytest.mark.gpu
def test_one_of_a_dimension_may_have_any_stride(library: Library) -> None:
    x = torch.zeros(40, 128, dtype=torch.bfloat16, device="cuda")
    box = Box((1, 40, 128), (1, 32, 64), (0, 0, 0))
    for stride in (0, 1, 7, 2**50):
        arguments = box.arguments(x.as_strided((1, 40, 128), (1, 128, 1)))
        arguments.stride[2] = stride
        library("tensor_map", ctypes.byref(arguments))


# --- Ordinary stores into tiles


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (64, 176))
def test_store_accumulators(library: Library, dtype: str, n: int) -> None:
    """64 rows of a tile of 128; numbers that need rounding, to the nearest even."""
    source = torch.randn(64, n)
    found = empty_image()
    library("store_accumulators", int(dtype == "fp16"), n, source.cuda(), 128, 64, found)
    tile = torch.full((128, (n + 63) // 64 * 64), -1, dtype=torch.int16).view(DTYPES[dtype])
    tile[64:, :n] = source.to(DTYPES[dtype])
    assert torch.equal(found.cpu(), image(tile))


@pytest.mark.gpu
def test_copy_async_gathers_rows_and_zeros(library: Library) -> None:
    x = torch.full((51, 128), float("nan"), dtype=torch.bfloat16)
    x[1:] = integers(50, 128, limit=100)
    index = torch.randint(1, 51, (96,), dtype=torch.int32)
    index[torch.rand(96) < 0.3] = -1  # whose address is that of row 0, of NaN
    found = empty_image()
    library("gather", x.cuda(), index.cuda(), 96, found)
    expected = torch.where(index[:, None] < 0, torch.zeros((), dtype=x.dtype), x[index.clamp(0)])
    assert torch.equal(found.cpu(), image(expected))


# --- Waiting


@pytest.mark.gpu
@pytest.mark.parametrize("count", (1, 3, 4, 1000))
def test_ring(library: Library, count: int) -> None:
    """Every consumer sees every item once and in order, in every block, with random delays on both sides."""
    blocks, words, sums = 3, 256, 192
    items = torch.randint(0, 2**31 - 1, (count, words), dtype=torch.int32)
    found = torch.full((blocks, sums, words), -1, dtype=torch.int32, device="cuda")
    library("ring", items.cuda(), count, blocks, found)
    expected = torch.arange(sums)[:, None].expand(sums, words)
    for item in items.long():
        expected = (expected * 31 + item) % 2**32
    assert torch.equal(found.cpu().long() % 2**32, expected.expand(blocks, sums, words))


@pytest.mark.gpu
def test_named_barriers_hand_over(library: Library) -> None:
    found = torch.full((500, 128), -1, dtype=torch.int32, device="cuda")
    library("hand_over", 500, found)
    assert torch.equal(found.cpu(), torch.arange(500 * 128, dtype=torch.int32).view(500, 128).flip(1))


@pytest.mark.gpu
@pytest.mark.parametrize("warpgroups", (2, 3))
def test_turns(library: Library, warpgroups: int) -> None:
    found = torch.full((300 * warpgroups,), -1, dtype=torch.int32, device="cuda")
    library("turns", warpgroups, 300, found)
    assert found.tolist() == list(range(warpgroups)) * 300


class Hang(ctypes.Structure):
    _fields_ = (
        ("recorded", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("thread", "barrier", "parity", "reserved")),
    )


@pytest.mark.gpu
def test_watchdog_reports_where_a_pipeline_hangs(library: Library) -> None:
    """Twice: a report is not the end of the process."""
    for forgotten in (0, 5):
        # Two stages: item f's stage is asked for again by item f + 2, and filled by nobody then.
        records, barriers = (Hang * 64)(), torch.zeros(4, dtype=torch.int32, device="cuda")
        library("watchdog", 40, 4, 2, forgotten, records, barriers)
        empty = barriers[2].item() + 8 * (forgotten % 2)
        parity = forgotten // 2 % 2
        expected = {((0, 2, 0), 0, empty, parity), ((0, 2, 0), 32, empty - 16, 1 - parity)}
        found = [(tuple(h.block), h.thread, h.barrier, h.parity) for h in records if h.recorded]
        assert set(found) == expected and len(found) == 2


@pytest.mark.gpu
def test_watchdog_is_silent_where_nothing_hangs(library: Library) -> None:
    records, barriers = (Hang * 64)(), torch.zeros(4, dtype=torch.int32, device="cuda")
    library("watchdog", 1000, 4, -1, 0, records, barriers)
    assert not any(h.recorded for h in records)


# --- The rest


@pytest.mark.gpu
def test_add_to_global(library: Library) -> None:
    terms, sums = integers(1000, limit=1000), integers(1000, limit=1000)
    found = sums.cuda()
    library("add", terms.cuda(), found, 1000, 500)
    assert torch.equal(found.cpu(), sums + 500 * terms)


@pytest.mark.gpu
def test_reductions_over_a_quad(library: Library) -> None:
    x = integers(256, limit=1000)
    maximum, total, power = (torch.full((256,), float("nan"), device="cuda") for _ in range(3))
    library("reduce", x.cuda(), 2, maximum, total, power)
    quads = x.view(-1, 4)
    assert torch.equal(maximum.cpu().view(-1, 4), quads.amax(1, keepdim=True).expand(-1, 4))
    assert torch.equal(total.cpu().view(-1, 4), quads.sum(1, keepdim=True).expand(-1, 4))


@pytest.mark.gpu
def test_quad_transpose(library: Library) -> None:
    # Quads, threads, blocks of 8 columns.
    pairs = torch.arange(128 * 4, dtype=torch.int32, device="cuda").view(32, 4, 4)
    found = torch.full_like(pairs, -1)
    library("transpose", pairs, found)
    assert torch.equal(found, pairs.transpose(1, 2))


@pytest.mark.gpu
def test_exp2(library: Library) -> None:
    x = torch.rand(1024) * 140 - 130
    x[:100] = torch.arange(-95, 5)
    x[100], x[101] = float("-inf"), -127.5
    maximum, total, power = (torch.full((1024,), float("nan"), device="cuda") for _ in range(3))
    library("reduce", x.cuda(), 8, maximum, total, power)
    exact = torch.exp2(x.double())
    exact[exact < 2**-126] = 0
    assert torch.equal(power[:102].cpu().double() == exact[:102], torch.ones(102, dtype=torch.bool))
    assert ((power.cpu().double() - exact).abs() <= 2**-22 * exact).all()


@pytest.mark.gpu
def test_one_lane_is_elected(library: Library) -> None:
    found = torch.full((4, 32), -1, dtype=torch.int32, device="cuda")
    library("elected", found)
    assert (found.sum(1) == 3).all() and (found.amax(1) == 3).all()


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", (False, True))
def test_next_kernel_begins_early_and_waits(library: Library, overlap: bool) -> None:
    """Also for what the previous kernel writes after it has let the next one in."""
    data, copy = (torch.full((128,), -1, dtype=torch.int32, device="cuda") for _ in range(2))
    times = torch.zeros(2, dtype=torch.int64, device="cuda")
    library("follow", int(overlap), data, copy, times)
    assert torch.equal(copy.cpu(), torch.arange(128, dtype=torch.int32))
    first_ended, second_began = times.tolist()
    assert (second_began < first_ended) == overlap


if __name__ == "__main__":  # what `flipped` starts
    torch.manual_seed(0)
    try_flips()
