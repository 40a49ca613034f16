"""`scaled_dot_product_attention` rerouted: the same results and gradients, and masks that are not ours are refused."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashmoe_train
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import sdpa

B, H, S, D = 2, 4, 11, 8


def both(calls: list[dict], keys: int = S, heads: int = H, queries: int = S, **options: object) -> None:
    """Results and gradients by PyTorch's plain mathematics and by ours."""
    q = torch.randn(B, H, queries, D, requires_grad=True)
    k, v = (torch.randn(B, heads, keys, D, requires_grad=True) for _ in range(2))
    dout = torch.randn(B, H, queries, D)
    found = []
    for context in (torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), flashmoe_train.swap_sdpa()):
        assert not calls
        with context:
            out = F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
        found.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    assert len(calls) == 1
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def documents(*lengths: int, causal: bool) -> Tensor:
    blocks = [torch.ones(n, n) for n in lengths]
    return torch.block_diag(*(block.tril() if causal else block for block in blocks)).bool()


def band(left: int, right: int, queries: int = S, keys: int = S) -> Tensor:
    ones = torch.ones(queries, keys, dtype=torch.bool)
    return ones.tril(right + keys - queries) & ones.triu(-left + keys - queries)


PADDING = torch.arange(S) < torch.tensor([7, S])[:, None]
LEFT = torch.arange(S) >= torch.tensor([4, 2])[:, None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "keys": 7},
        {"is_causal": True, "keys": 15},
        {"keys": 5, "scale": 0.3},
        {"heads": 2, "enable_gqa": True, "is_causal": True},
    ],
)
def test_without_a_mask(options: dict, calls: list[dict]) -> None:
    both(calls, **options)
    assert "cu_seqlens_q" not in calls[0]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    "mask, keys, window",
    [
        (torch.ones(S, S, dtype=torch.bool), S, (None, None)),
        (torch.ones(1, 1, dtype=torch.bool), S, (None, None)),
        (band(S, 0), S, (None, 0)),
        (band(S, 0).expand(B, H, S, S), S, (None, 0)),
        (band(S, 0).repeat(B, H, 1, 1), S, (None, 0)),
        (band(3, 0), S, (3, 0)),
        (band(2, 4)[None, None], S, (2, 4)),
        (band(20, 0, S, 15), 15, (None, 0)),  # aligned to the bottom right, as with a cache
    ],
)
def test_bands(mask: Tensor, keys: int, window: tuple, additive: bool, calls: list[dict]) -> None:
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    both(calls, keys=keys, attn_mask=mask)
    assert calls[0]["window"] == window and "cu_seqlens_q" not in calls[0]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    "mask, bounds",
    [
        (documents(4, 1, 6, causal=True), [0, 4, 5, 11, 15, 16, 22]),
        (documents(4, 7, causal=False), [0, 4, 11, 15, 22]),
        (torch.stack([documents(4, 7, causal=True), documents(9, 2, causal=True)])[:, None], [0, 4, 11, 20, 22]),
        (documents(5, 6, causal=True) & band(2, 0), [0, 5, 11, 16, 22]),
        (PADDING[:, None, None], [0, 0, 11, 11, 11, 22, 22]),
        (LEFT[:, None, None], [0, 0, 11, 11, 11, 22, 22]),
        (PADDING[:, None, None].expand(B, 1, S, S).clone(), [0, 0, 11, 11, 11, 22, 22]),
    ],
)
def test_documents_and_padding(mask: Tensor, bounds: list[int], additive: bool, calls: list[dict]) -> None:
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    both(calls, attn_mask=mask)
    assert calls[0]["cu_seqlens_q"].tolist() == bounds


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize(
    "mask, reason",
    [
        (torch.rand(S, S, generator=torch.Generator().manual_seed(0)) < 0.5, "is no band, no documents and no padding"),
        (band(S, 0) & PADDING[:, None, None], "is no band, no documents and no padding"),  # padding sees tokens
        (torch.randn(S, S), "values other than 0 and -inf"),
        (torch.zeros(S, S, requires_grad=True), "requires gradients"),
        (band(S, 0).float(), "values other than 0 and -inf"),
        (band(S, -1), "hides a token from itself"),
        (torch.arange(S)[None, None, None] % 3 > 0, "is no band, no documents and no padding"),
        (torch.stack([band(S, 0), band(2, 0), band(S, 0), band(S, 0)])[None], "another for other heads"),
    ],
)
def test_other_masks_are_refused(mask: Tensor, reason: str, heads: int) -> None:
    q, k, v = torch.randn(3, B, H, S, D).unbind()
    with flashmoe_train.swap_sdpa(), pytest.raises(UsageError, match=f"cannot be swapped: .*{reason}"):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dropout_p": 0.1}, "dropout_p is 0.1"),
        ({"query": torch.randn(S, D)}, "batch, heads, sequence, head_dim"),
        ({"query": torch.randn(1, H, S, D)}, "without broadcasting"),
        ({"query": torch.randn(B, 2 * H, S, D)}, "8 heads of queries and 4 of keys, without enable_gqa"),
        ({"query": torch.randn(B, 6, S, D), "enable_gqa": True}, "6 heads of queries and 4 of keys, with enable_gqa"),
        (
            dict.fromkeys(("key", "value"), torch.randn(B, 0, S, D)) | {"enable_gqa": True},
            "4 heads of queries and 0 of keys, with enable_gqa",
        ),
        ({"is_causal": True, "attn_mask": band(S, 0)}, "both given"),
    ],
)
def test_other_calls_are_refused(options: dict, reason: str) -> None:
    tensors = {name: torch.randn(B, H, S, D) for name in ("query", "key", "value")}
    with flashmoe_train.swap_sdpa(), pytest.raises(UsageError, match=reason):
        F.scaled_dot_product_attention(**tensors | options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("refused", ["error", "stock"])
@pytest.mark.parametrize(
    "options",
    [
        {"key": torch.randn(B, H, S, D).double()},
        {"value": torch.randn(B, H, S, D).double()},
        dict.fromkeys(("key", "value"), torch.ones(B, H, S, D, dtype=torch.int64)),
        dict.fromkeys(("query", "key", "value"), torch.ones(B, H, S, D, dtype=torch.int64)),
        *({"attn_mask": torch.zeros(S, S, dtype=dtype)} for dtype in (torch.float64, torch.int64, torch.uint8)),
        {"query": torch.randn(B, H, S, D).double(), "attn_mask": torch.zeros(S, S, dtype=torch.float16)},
        *(
            {"attn_mask": torch.ones(shape, dtype=torch.bool)}
            for shape in ((B, 3, S, S), (1, 7, S, S), (3, S, S), (3, 1, S, S), (S, 5), (5, S), (S,), (1, 1, 1, S, S))
        ),
    ],
)
def test_wrong_arguments_get_pytorchs_words(options: dict, refused: sdpa.Refused, autocast: bool) -> None:
    tensors = {name: torch.randn(B, H, S, D) for name in ("query", "key", "value")} | options
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, IndexError)) as stock:
            F.scaled_dot_product_attention(**tensors)
        with flashmoe_train.swap_sdpa(refused), pytest.raises(stock.type) as swapped:
            F.scaled_dot_product_attention(**tensors)
    assert str(swapped.value) == str(stock.value)


@pytest.mark.parametrize("options", [{"key": torch.float16}, {"value": torch.bfloat16}, {"attn_mask": torch.float16}])
def test_dtypes_that_only_autocast_makes_one(options: dict, calls: list[dict]) -> None:
    tensors = {name: torch.randn(B, H, S, D) for name in ("query", "key", "value")} | {"attn_mask": torch.zeros(S, S)}
    tensors |= {name: tensors[name].to(dtype) for name, dtype in options.items()}
    with flashmoe_train.swap_sdpa(), pytest.raises(RuntimeError, match=r"dtype.* but got"):
        F.scaled_dot_product_attention(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.scaled_dot_product_attention(**tensors)
        with flashmoe_train.swap_sdpa():
            found = F.scaled_dot_product_attention(**tensors)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert len(calls) == 1


def test_float32_mask_beside_another_dtype(calls: list[dict]) -> None:
    """Which PyTorch takes too."""
    q, mask = torch.randn(B, H, S, D).bfloat16(), torch.zeros(S, S).masked_fill(~band(S, 0), -torch.inf)
    with flashmoe_train.swap_sdpa():
        found = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    wanted = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert calls[0]["window"] == (None, 0)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("batch, queries, keys", [(B, 0, S), (B, S, 0), (B, 0, 0), (0, S, S)])
@pytest.mark.parametrize("rank", [2, 4])
def test_masks_of_empty_sequences(
    rank: int, batch: int, queries: int, keys: int, additive: bool, calls: list[dict]
) -> None:
    q = torch.randn(batch, H, queries, D)
    k, v = torch.randn(2, batch, H, keys, D).unbind()
    shape = (batch, H, queries, keys)[-rank:]
    mask = torch.zeros(shape) if additive else torch.ones(shape, dtype=torch.bool)
    with flashmoe_train.swap_sdpa():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) and len(calls) == 1


def test_masks_without_values() -> None:
    q, mask = torch.randn(B, H, S, D), torch.ones(S, S, dtype=torch.bool, device="meta")
    with flashmoe_train.swap_sdpa():
        with pytest.raises(ValueError, match="on one device, found query on cpu and the mask on meta"):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        with pytest.raises(UsageError, match="on the meta device, where it has no values"):
            F.scaled_dot_product_attention(*[q.to("meta")] * 3, attn_mask=mask)


def test_refused_calls_can_go_to_pytorch(calls: list[dict]) -> None:
    q, k, v = torch.randn(3, B, H, S, D).unbind()
    mask = torch.rand(S, S) < 0.5
    with flashmoe_train.swap_sdpa(refused="stock"), pytest.warns(UserWarning, match="by PyTorch: attn_mask is no band"):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) and not calls
    with pytest.raises(UsageError, match="refused must be one of 'error', 'stock', found 'warn'"):
        flashmoe_train.swap_sdpa(refused="warn")  # type: ignore[arg-type]


def test_only_inside(calls: list[dict]) -> None:
    q = torch.randn(B, H, S, D)
    with flashmoe_train.swap_sdpa():
        F.scaled_dot_product_attention(q, q, q)
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 1


def test_decorator(calls: list[dict]) -> None:
    class Layer(nn.Module):
        @flashmoe_train.swap_sdpa()
        def forward(self, x: Tensor) -> Tensor:
            """Said of it."""
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    layer, x = Layer(), torch.randn(B, H, S, D)
    for _ in range(2):
        layer(x)
    assert len(calls) == 2 and Layer.forward.__doc__ == "Said of it."


def test_a_mask_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it changes."""
    analysed, stock = [], sdpa.analyse
    monkeypatch.setattr(sdpa, "analyse", lambda *arguments: (analysed.append(1), stock(*arguments))[1])
    q, mask = torch.randn(B, H, S, D), band(S, 0)
    with flashmoe_train.swap_sdpa():
        for _ in range(3):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        assert len(analysed) == 1
        mask[5, 2] = False
        with pytest.raises(UsageError, match="no band"):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_autocast(calls: list[dict]) -> None:
    q = torch.randn(B, H, S, D)
    with torch.autocast("cpu", torch.bfloat16), flashmoe_train.swap_sdpa():
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16


def test_layouts(calls: list[dict]) -> None:
    """A last dimension that is not contiguous is copied."""
    q = torch.randn(B, H, D, S).transpose(2, 3)
    with flashmoe_train.swap_sdpa():
        found = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_compiles_whole(inside: bool) -> None:
    def plain(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def swapped(x: Tensor) -> Tensor:
        with flashmoe_train.swap_sdpa():
            return plain(x)

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(B, H, S, D)
    if inside:
        found = torch.compile(swapped, fullgraph=True, backend=backend)(x)
    else:
        with flashmoe_train.swap_sdpa():
            found = torch.compile(plain, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-5)
    (graph,) = graphs
    assert any("attention_forward" in str(node.target) for node in graph.graph.nodes)


def test_compiling_refuses_masks() -> None:
    def masked(x: Tensor, mask: Tensor) -> Tensor:
        with flashmoe_train.swap_sdpa(refused="stock"):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(B, H, S, D), band(3, 0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = torch.compile(masked, fullgraph=True, backend="aot_eager")(x, mask)
    assert any("cannot be looked at while compiling" in str(warning.message) for warning in warned)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(x, x, x, attn_mask=mask))


def test_transformers_sdpa_is_within_reach(calls: list[dict]) -> None:
    """Models without an adapter of ours, by the function that they call."""
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    ids, mask = torch.randint(32, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    wanted = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    with flashmoe_train.swap_sdpa():
        found = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
