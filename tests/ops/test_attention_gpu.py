"""The correctness contract of attention's CUDA kernel, and of the gradients that follow from its out and lse."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from .attention_cases import Case, oracle
from .attention_gpu import (
    DTYPES,
    HEAD_DIMS,
    MASKS,
    SMALL,
    TILES,
    assert_gradients,
    assert_lse,
    assert_right,
    assert_within_contract,
    kernel,
    oracle_gradients,
    out_of,
    perfect_flash,
    random_case,
    random_inputs,
    sdpa_flash,
    with_tiles,
)
from .operators import ON_HOPPER, assert_close_in_norm, chooser, forward_backward

pytestmark = ON_HOPPER


# ------------------------------------------------------------------------------------------------------ how exact it is


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [128, 512, 2048])
@pytest.mark.parametrize("dim", [64, 128])
def test_classic_shapes(dim: int, length: int, causal: bool, dtype: torch.dtype) -> None:
    case = Case(batch=4, length_q=length, heads=8, groups=8, dim=dim, causal=causal)
    q, k, v = random_inputs(case, dtype)
    wanted_out, wanted_lse = oracle(case, q, k, v)
    out, lse = kernel(case, q, k, v)
    perfect, *_ = perfect_flash(case, q, k, v, torch.zeros_like(out))
    assert_within_contract("out", out, wanted_out, perfect, sdpa_flash(case, q, k, v))
    assert_lse("lse", lse, wanted_lse)
    # The rounding of causal attention's first rows, which see a key or two, comes close to this bound by itself.
    largest, of_perfect = ((x.double() - wanted_out).abs().max().item() for x in (out, perfect))
    assert largest < (max(1e-2, 1.15 * of_perfect) if causal else 1e-2)


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_contract_of_out_and_gradients(dim: int, dim_v: int, causal: bool, dtype: torch.dtype, tiles: str) -> None:
    case = with_tiles(tiles, Case(batch=2, length_q=1000, heads=4, groups=4, dim=dim, dim_v=dim_v, causal=causal))
    inputs = case.tensors(dtype, "cuda")
    wanted_out, wanted_lse = oracle(case, *inputs)
    dout = torch.randn_like(wanted_out).to(dtype)
    wanted = wanted_out.detach(), *oracle_gradients(case, dout, *inputs)
    found = forward_backward(out_of(case), inputs, dout)
    yardsticks = [perfect_flash(case, *inputs, dout)]
    if dim == dim_v:
        yardsticks.append(forward_backward(functools.partial(sdpa_flash, case), inputs, dout))
    for name, x, y, *of_yardsticks in zip(("out", "dq", "dk", "dv"), found, wanted, *yardsticks, strict=True):
        assert_within_contract(name, x, y, *of_yardsticks)
    assert_lse("lse", kernel(case, *inputs)[1], wanted_lse)


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_ragged_lengths(dim: int, dim_v: int, dtype: torch.dtype, tiles: str) -> None:
    lengths = (1, 7, 63, 64, 65, 127, 129, 1000)
    for length, causal in itertools.product(lengths, (False, True)):
        case = with_tiles(tiles, Case(length_q=length, dim=dim, dim_v=dim_v, causal=causal))
        q, k, v = random_inputs(case, dtype)
        assert_right(str(case), kernel(case, q, k, v), oracle(case, q, k, v))


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
@pytest.mark.parametrize("case", MASKS + SMALL, ids=str)
def test_every_mask(case: Case, dim: int, dim_v: int, dtype: torch.dtype, tiles: str) -> None:
    case = with_tiles(tiles, replace(case, dim=dim, dim_v=dim_v))
    q, k, v = random_inputs(case, dtype)
    assert_right("out", kernel(case, q, k, v), oracle(case, q, k, v))


@pytest.mark.parametrize(
    "dim, dim_v, dtype", [(64, 64, torch.bfloat16), (192, 128, torch.bfloat16), (96, 96, torch.float16)]
)
@pytest.mark.parametrize("case", MASKS + SMALL, ids=str)
def test_gradients_of_every_mask(case: Case, dim: int, dim_v: int, dtype: torch.dtype) -> None:
    case = replace(case, dim=dim, dim_v=dim_v)
    assert_gradients(case, case.tensors(dtype, "cuda"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (8, 2), (8, 1), (16, 2), (3, 1), (15, 3), (7, 7), (21, 21)])
def test_ratios_of_heads(heads: int, groups: int, causal: bool) -> None:
    for dim, dim_v in HEAD_DIMS:
        case = Case(length_q=200, heads=heads, groups=groups, dim=dim, dim_v=dim_v, causal=causal)
        assert_gradients(case, case.tensors(torch.bfloat16, "cuda"))


@pytest.mark.parametrize("softmax_scale", [1e-3, 0.3, 1.0])
def test_scales(softmax_scale: float) -> None:
    case = Case(length_q=200, dim=64, causal=True, softmax_scale=softmax_scale)
    q, k, v = random_inputs(case, torch.bfloat16)
    assert_right("out", kernel(case, q, k, v), oracle(case, q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_large_logits(dim: int, dim_v: int, causal: bool) -> None:
    case = Case(length_q=300, dim=dim, dim_v=dim_v, causal=causal, softmax_scale=1.0)
    q, k, v = random_inputs(case, torch.bfloat16)
    size = (1e4 / 3 / dim**0.5) ** 0.5  # the largest of 300 numbers N(0, 1) are about 3
    q, k = q * size, k * size
    (out, lse), (wanted_out, wanted_lse) = kernel(case, q, k, v), oracle(case, q, k, v)
    assert wanted_lse.abs().max() > 7e3
    assert_close_in_norm("out", out, wanted_out)
    assert ((lse - wanted_lse).abs() <= 1e-3 + 5e-6 * wanted_lse.abs()).all()  # sums of float32


@pytest.mark.parametrize("chunk", range(8))
def test_random_shapes(chunk: int) -> None:
    pick = chooser(seed=chunk)
    for _ in range(250):
        case, dtype = random_case(pick)
        q, k, v = random_inputs(case, dtype)
        assert_right(f"{case} {dtype}", kernel(case, q, k, v), oracle(case, q, k, v))


# ------------------------------------------------------------------------------------------------------ stages, by one

# Keys of one tile, of two, and of tiles of which the last is a part; tiles have 64 to 192 keys.
KEYS = [1, 16, 64, 80, 128, 129, 176, 192, 200, 256, 257, 384, 400]


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_scores_alone(dim: int, dim_v: int, dtype: torch.dtype, tiles: str) -> None:
    """Values that are 1 in one place: out is the probabilities of as many keys as values have dims."""
    for keys in KEYS:
        case = with_tiles(tiles, Case(batch=1, length_q=130, length_k=keys, heads=2, groups=1, dim=dim, dim_v=dim_v))
        q, k, v = random_inputs(case, dtype)
        scores = torch.einsum("bihd,bjhd->bihj", q.double(), k.double().repeat_interleave(2, 2)) * dim**-0.5
        wanted = scores.softmax(-1)
        for begin in range(0, keys, dim_v):
            seen = torch.arange(begin, min(keys, begin + dim_v), device="cuda")
            v.zero_()
            v[:, seen, :, seen - begin] = 1
            out, _ = kernel(case, q, k, v)
            torch.testing.assert_close(out[..., : len(seen)].double(), wanted[..., seen], rtol=1e-2, atol=1e-6)
            assert not out[..., len(seen) :].any()


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_softmax_alone(dim: int, dim_v: int, dtype: torch.dtype, tiles: str) -> None:
    """Equal keys and values of 1: out is the sum of the probabilities."""
    for keys, causal in itertools.product(KEYS, (False, True)):
        case = Case(batch=1, length_q=keys, heads=2, groups=1, dim=dim, dim_v=dim_v, causal=causal)
        case = with_tiles(tiles, case)
        q, k, v = random_inputs(case, dtype)
        k = k[:, :1].expand_as(k)
        out, lse = kernel(case, q, k, torch.ones_like(v))
        assert torch.equal(out, torch.ones_like(out)), str(case)
        assert_lse(str(case), lse, oracle(case, q, k, v)[1])


@TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", HEAD_DIMS)
def test_product_with_values_alone(dim: int, dim_v: int, dtype: torch.dtype, tiles: str) -> None:
    """Queries of 0: out is the mean of the values, rounded once."""
    for keys, causal in itertools.product(KEYS, (False, True)):
        case = Case(batch=1, length_q=keys, heads=2, groups=1, dim=dim, dim_v=dim_v, causal=causal)
        case = with_tiles(tiles, case)
        q, k, v = random_inputs(case, dtype)
        out, lse = kernel(case, torch.zeros_like(q), k, v)
        wanted_out, wanted_lse = oracle(case, torch.zeros_like(q), k, v)
        assert_lse(str(case), lse, wanted_lse)
        torch.testing.assert_close(out.double(), wanted_out, rtol=torch.finfo(dtype).eps, atol=1e-5)
