"""Swapped core attention against Megatron's own, and against the definition where that has none."""

import types
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import attention as module
from flashmoe_train.integrations.megatron.attention import FlashMoEAttention
from flashmoe_train.ops.attention import copies

SEQ, BATCH, HEADS, GROUPS, DIM = 12, 2, 4, 2, 8


def config(**options: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_query_groups": GROUPS}
    return TransformerConfig(**sizes, attention_dropout=0.0, hidden_dropout=0.0, **options)


def build(given: TransformerConfig | None = None, layer: int = 1, **options: Any) -> FlashMoEAttention:
    return FlashMoEAttention(given or config(), layer, AttnMaskType.causal, "self", **options)


def mixed(*sizes: int, heads: int = HEADS + 2 * GROUPS, dim: int = DIM) -> Tensor:
    return torch.randn(*sizes, heads, dim, requires_grad=True)


def split(qkv: Tensor) -> list[Tensor]:
    """Views of one tensor, as Megatron's projection leaves them."""
    return list(qkv.split([HEADS, GROUPS, GROUPS], dim=-2))


def defined(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`[S, B, H, D]` and the like give `[S, B, H · V]`; `mask` is True where a query sees a key."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).flatten(2)


def causal(length: int, window: int | None = None) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return mask if window is None else mask.triu(-window)


def same(found: Tensor, wanted: Tensor, source: Tensor) -> None:
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    got, expected = (torch.autograd.grad((x * weight).sum(), source) for x in (found, wanted))
    torch.testing.assert_close(got, expected)


def test_views_of_one_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = mixed(SEQ, BATCH)
    seen: list[tuple[Tensor, ...]] = []
    stock = module.attention

    def spy(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append(tensors)
        return stock(*tensors, **options)

    monkeypatch.setattr(module, "attention", spy)
    found = build()(*split(qkv), None)
    assert found.shape == (SEQ, BATCH, HEADS * DIM)
    same(found, defined(*split(qkv), DIM**-0.5, causal(SEQ)), qkv)
    assert all(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in seen[0])
    assert copies(*(x.detach().bfloat16() for x in seen[0])) == {}


def test_masks_and_windows() -> None:
    qkv = mixed(SEQ, BATCH)
    q, k, v = split(qkv)
    same(build()(q, k, v, None, attn_mask_type=AttnMaskType.no_mask), defined(q, k, v, DIM**-0.5, None), qkv)
    narrow = config(window_size=(3, 0), window_attn_skip_freq=2)
    same(build(narrow)(q, k, v, None), defined(q, k, v, DIM**-0.5, causal(SEQ, 3)), qkv)
    same(build(narrow, layer=2)(q, k, v, None), defined(q, k, v, DIM**-0.5, causal(SEQ)), qkv)
    with pytest.raises(UsageError, match=r"attn_mask_type of causal, padding_causal, no_mask, found padding"):
        build()(q, k, v, None, attn_mask_type=AttnMaskType.padding)
    with pytest.raises(UsageError, match="attention_bias"):
        build()(q, k, v, None, attention_bias=torch.zeros(1))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("options", [{}, {"apply_query_key_layer_scaling": True}, {"window_size": (3, 0)}])
def test_computes_as_stock(options: dict[str, Any]) -> None:
    """Layer scaling divides before the softmax and multiplies within it: it is for float16's range alone."""
    given, qkv = config(**options), mixed(SEQ, BATCH)
    stock = DotProductAttention(given, 2, AttnMaskType.causal, "self")
    wanted = stock(*split(qkv), ~causal(SEQ)[None, None], attn_mask_type=AttnMaskType.causal)
    same(build(given, layer=2)(*split(qkv), None), wanted, qkv)


def test_values_of_another_dim_than_keys() -> None:
    q, k = (torch.randn(SEQ, BATCH, HEADS, 12, requires_grad=True) for _ in range(2))
    v = torch.randn(SEQ, BATCH, HEADS, 8)
    found = build(softmax_scale=0.3, k_channels=12, v_channels=8)(q, k, v, None)
    same(found, defined(q, k, v, 0.3, causal(SEQ)), q)
    assert build(k_channels=12, v_channels=8).softmax_scale == 12**-0.5


def test_packed_sequences_do_not_see_each_other() -> None:
    qkv = mixed(SEQ)
    bounds = [0, 5, 5, SEQ]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32))
    packed.cu_seqlens_kv = packed.cu_seqlens_q
    found = build()(*split(qkv), None, packed_seq_params=packed)
    assert found.shape == (SEQ, HEADS * DIM)
    parts = [
        defined(*(x[a:b, None] for x in split(qkv)), DIM**-0.5, causal(b - a)).squeeze(1) for a, b in ((0, 5), (5, SEQ))
    ]
    same(found, torch.cat(parts), qkv)


def test_padding_between_packed_sequences() -> None:
    """Two documents of 4 and 5 tokens in places of 6 each."""
    qkv = mixed(SEQ)
    own, padded = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 6, 12]))
    packed = PackedSeqParams("thd", own, own, padded, padded)
    found = build()(*split(qkv), None, packed_seq_params=packed)
    for start, length in ((0, 4), (6, 5)):
        alone = defined(*(x[start : start + length, None] for x in split(qkv)), DIM**-0.5, causal(length)).squeeze(1)
        torch.testing.assert_close(found[start : start + length], alone)
    with pytest.raises(UsageError, match="need a causal mask"):
        build()(*split(qkv), None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=packed)
    with pytest.raises(UsageError, match="qkv_format 'thd', found 'sbhd'"):
        build()(*split(qkv), None, packed_seq_params=types.SimpleNamespace(qkv_format="sbhd"))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: it has none, set 0.0"),
        ({"softmax_type": "learnable"}, "softmax_type = 'learnable'"),
        ({"context_parallel_size": 2}, "there is no context parallelism"),
        ({"qk_clip": True}, "qk_clip"),
    ],
)
def test_what_it_does_not_compute_is_named(options: dict[str, Any], text: str) -> None:
    given = config()
    for key, value in options.items():
        setattr(given, key, value)
    with pytest.raises(UsageError, match=text):
        build(given)
