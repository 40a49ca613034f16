"""`flashmoe_train.swap` on models of PyTorch's own modules: the same outputs and gradients, and no silent fallback."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import flashmoe_train
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import sdpa
from flashmoe_train.integrations.pytorch import FlashMoEMultiheadAttention

from ..ops.operators import Copied

LENGTH, DIM = 7, 24


def both(module: nn.MultiheadAttention, *inputs: Tensor, **options: object) -> list[list[Tensor]]:
    """Output and gradients, stock and swapped; the swapped one must not fall back."""
    results = []
    for expected in (nn.MultiheadAttention, FlashMoEMultiheadAttention):
        assert type(module) is expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, weights = module(*inputs, need_weights=False, **options)
        assert weights is None
        leaves = [*dict.fromkeys(inputs), *module.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        if expected is nn.MultiheadAttention:
            flashmoe_train.swap(module)
    return results


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", ["self", "cross", "unbatched", "own dims"])
def test_full_attention(shape: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    dims = {"kdim": 10, "vdim": 6} if shape == "own dims" else {}
    module = nn.MultiheadAttention(DIM, 4, bias=shape != "cross", batch_first=batch_first, **dims)

    def tokens(length: int, dim: int = DIM) -> Tensor:
        sizes = [(2, length, dim), (length, 2, dim)][not batch_first] if shape != "unbatched" else (length, dim)
        return torch.randn(sizes, requires_grad=True)

    q = tokens(LENGTH)
    k, v = {
        "self": (q, q),
        "cross": (tokens(9), tokens(9)),
        "unbatched": (tokens(5), tokens(5)),
        "own dims": (tokens(9, 10), tokens(9, 6)),
    }[shape]
    for stock, ours in zip(*both(module, q, k, v), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_self", [True, False], ids=["self", "cross"])
def test_attention_kernel_reads_in_place(is_self: bool, batch_first: bool) -> None:
    module = nn.MultiheadAttention(128, 2, batch_first=batch_first, dtype=torch.bfloat16)
    flashmoe_train.swap(module)
    x = torch.randn(3, 5, 128, dtype=torch.bfloat16)
    with Copied() as copied:
        module(x, *[x if is_self else x.clone()] * 2, need_weights=False)
    assert copied.calls == [{}]


def test_causal_attention() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, 2, batch_first=True)
    q, k, v = (torch.randn(2, LENGTH, DIM, requires_grad=True) for _ in range(3))
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for stock, ours in zip(*both(module, q, k, v, attn_mask=mask, is_causal=True), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["window", "heads", "padding"])
def test_masks_that_can_be_expressed(kind: str, batch_first: bool, additive: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, 2, batch_first=batch_first)
    q, k, v = (torch.randn(2, LENGTH, DIM).transpose(0, 1 - batch_first).requires_grad_() for _ in range(3))
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    hidden = (distance > 0) | (distance < -2)
    if kind == "heads":
        hidden = hidden.repeat(4, 1, 1)  # [batch · heads, S, T]
    elif kind == "padding":
        hidden = torch.arange(LENGTH) > torch.tensor([[3], [5]])
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf) if additive else hidden
    name = "key_padding_mask" if kind == "padding" else "attn_mask"
    for stock, ours in zip(*both(module, q, k, v, **{name: mask}), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, "need_weights=True asks for the attention weights"),
        ({"need_weights": False, "key_padding_mask": torch.arange(9)[None] % 3 == 1}, "no padding of keys"),
        ({"need_weights": False, "attn_mask": torch.eye(LENGTH, 9) > 0}, "attn_mask is no band"),
        (
            {
                "need_weights": False,
                "attn_mask": torch.ones(LENGTH, 9) < 0,
                "key_padding_mask": torch.arange(9)[None] > 6,
            },
            "attn_mask and key_padding_mask together",
        ),
        (
            {"need_weights": False, "attn_mask": torch.ones(LENGTH, 9).triu(1) > 0, "is_causal": True},
            "as many queries as keys",
        ),
    ],
)
def test_what_it_cannot_express_goes_to_pytorch(options: dict, reason: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, 2, batch_first=True)
    q, k = torch.randn(1, LENGTH, DIM), torch.randn(1, 9, DIM)
    wanted = module(q, k, k, **options)
    flashmoe_train.swap(module)
    with pytest.warns(UserWarning, match=f"computed by PyTorch: .*{reason}"):
        torch.testing.assert_close(module(q, k, k, **options), wanted)


@pytest.mark.parametrize(
    "shapes, options",
    [
        ([(2, 5, DIM), (5, DIM), (5, DIM)], {}),
        ([(5, DIM), (2, 5, DIM), (2, 5, DIM)], {}),
        ([(2, 5, 7)] * 3, {}),
        ([(2, 2, 5, DIM)] * 3, {}),
        ([(2, 5, DIM)] * 3, {"is_causal": True}),  # without the mask
    ],
)
def test_wrong_arguments_get_pytorchs_words(shapes: list, options: dict) -> None:
    module = nn.MultiheadAttention(DIM, 2, batch_first=True)
    inputs = [torch.randn(shape) for shape in shapes]
    with pytest.raises((RuntimeError, AssertionError)) as stock:
        module(*inputs, need_weights=False, **options)
    flashmoe_train.swap(module)
    with pytest.raises(stock.type) as swapped:
        module(*inputs, need_weights=False, **options)
    assert str(swapped.value) == str(stock.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("batched, batch_first", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "name, shape",
    [
        *(("key_padding_mask", shape) for shape in ((6, 2), (12,), (3, 4), (1, 6), (2, 6, 1), ())),
        *(
            ("attn_mask", shape)
            for shape in ((2, 6, 6), (16, 6, 6), (3, 6, 6), (1, 6, 6), (8, 1, 6), (1, 6), (6, 1), (36,), (2, 4, 6, 6))
        ),
    ],
)
def test_masks_of_another_shape_get_pytorchs_words(
    name: str, shape: tuple, batched: bool, batch_first: bool, dtype: torch.dtype
) -> None:
    refuses_like_pytorch({name: torch.zeros(shape, dtype=dtype)}, batched, batch_first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("name, shape", [("key_padding_mask", (2, 6)), ("attn_mask", (6, 6)), ("attn_mask", (8, 6, 6))])
def test_masks_of_another_dtype_get_pytorchs_words(name: str, shape: tuple, dtype: torch.dtype) -> None:
    refuses_like_pytorch({name: torch.zeros(shape, dtype=dtype)})


def test_padding_of_an_empty_batch_gets_pytorchs_words() -> None:
    refuses_like_pytorch({"key_padding_mask": torch.zeros(0, 6) > 0}, batch=0)


def refuses_like_pytorch(masks: dict, batched: bool = True, batch_first: bool = True, batch: int = 2) -> None:
    module, x = nn.MultiheadAttention(DIM, 4, batch_first=batch_first), torch.randn(batch, 6, DIM)
    x = (x if batch_first else x.transpose(0, 1)) if batched else x[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, AssertionError)) as stock:
            module(x, x, x, need_weights=False, **masks)
        flashmoe_train.swap(module)
        with pytest.raises(stock.type) as swapped:
            module(x, x, x, need_weights=False, **masks)
    assert str(swapped.value) == str(stock.value)


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_masks_of_no_queries(name: str) -> None:
    module = nn.MultiheadAttention(DIM, 2, batch_first=True)
    q, k = torch.randn(2, 0, DIM, requires_grad=True), torch.randn(2, 9, DIM, requires_grad=True)
    shape = (2, 9) if name == "key_padding_mask" else (0, 9)
    for stock, ours in zip(*both(module, q, k, k, **{name: torch.zeros(shape) > 0}), strict=True):
        torch.testing.assert_close(ours, stock)


def test_masks_without_values_are_refused() -> None:
    """From which PyTorch computes something."""
    module, x = nn.MultiheadAttention(DIM, 2, batch_first=True), torch.randn(2, LENGTH, DIM)
    flashmoe_train.swap(module)
    with pytest.raises(ValueError, match="on one device, found query on cpu and the mask on meta"):
        module(x, x, x, need_weights=False, key_padding_mask=torch.zeros(2, LENGTH, device="meta") > 0)


def test_dropout_after_the_swap_is_not_ignored() -> None:
    module, x = nn.MultiheadAttention(DIM, 2, batch_first=True), torch.randn(2, LENGTH, DIM)
    flashmoe_train.swap(module)
    module.dropout = 0.9
    with pytest.warns(UserWarning, match="dropout was switched on after the swap"):
        first, second = (module(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_transformer_encoder_trains_the_same() -> None:
    """Weights after three steps, in a stack of PyTorch's own layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, 48, dropout=0.0, batch_first=True)
    stock, swapped = nn.TransformerEncoder(layer, 2), nn.TransformerEncoder(layer, 2)
    swapped.load_state_dict(stock.state_dict())
    report = flashmoe_train.swap(swapped)
    assert report.summary() == [
        ("layers.*", "TransformerEncoderLayer", "FlashMoETransformerEncoderLayer", 2),
        ("layers.*.self_attn", "MultiheadAttention", "FlashMoEMultiheadAttention", 2),
    ]
    assert "layers.*.self_attn" in str(report)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for model in (stock, swapped):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(2, LENGTH, DIM), mask=mask, is_causal=True).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, want in stock.state_dict().items():
        torch.testing.assert_close(swapped.state_dict()[name], want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_encoder_layer_in_inference(causal: bool, grad: bool, norm_first: bool, calls: list[dict]) -> None:
    """Where PyTorch's own layer, without gradients, would not call its attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, 48, batch_first=True, norm_first=norm_first, dropout=0.0).eval()
    x = torch.randn(2, LENGTH, DIM)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    with torch.set_grad_enabled(grad):
        wanted = layer(x, mask, is_causal=causal)
        flashmoe_train.swap(layer)
        found = layer(x, mask, is_causal=causal)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert [call["window"] for call in calls] == [(None, 0) if causal else (None, None)]


def test_padding_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers of an encoder, until another batch brings another."""
    analysed, stock = [], sdpa.analyse
    monkeypatch.setattr(sdpa, "analyse", lambda *arguments: (analysed.append(1), stock(*arguments))[1])
    layer = nn.TransformerEncoderLayer(DIM, 2, 48, batch_first=True, dropout=0.0)
    model, x = nn.ModuleList(nn.TransformerEncoder(layer, 1).layers[0] for _ in range(3)), torch.randn(2, LENGTH, DIM)
    wanted, padding = x, torch.zeros(2, LENGTH) > 0
    padding[0, 4:] = True
    for layer in model:
        wanted = layer(wanted, src_key_padding_mask=padding)
    flashmoe_train.swap(model)
    for layer in model:
        x = layer(x, src_key_padding_mask=padding)
    torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5)
    assert len(analysed) == 1


@pytest.mark.parametrize("training", [True, False])
def test_decoder(training: bool, calls: list[dict]) -> None:
    """Causal attention over itself and full attention over the memory, outputs and gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(DIM, 2, 48, batch_first=True, dropout=0.0)
    model = nn.TransformerDecoder(layer, 2).train(training)
    x, memory = torch.randn(2, LENGTH, DIM, requires_grad=True), torch.randn(2, 9, DIM, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    found = []
    for swapped in (False, True):
        if swapped:
            report = flashmoe_train.swap(model)
            assert [row[0] for row in report.summary()] == ["layers.*.self_attn", "layers.*.multihead_attn"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = model(x, memory, tgt_mask=mask)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, memory, *model.parameters()])])
    assert [call["window"] for call in calls] == [(None, 0), (None, None)] * 2
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_nested_tensors_go_to_pytorch() -> None:
    """What TransformerEncoder makes of padding in inference."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, 48, dropout=0.0, batch_first=True)
    model, x, padding = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, LENGTH, DIM), torch.zeros(2, LENGTH) > 0
    padding[0, 4:] = True
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=padding)
        flashmoe_train.swap(model)
        with pytest.warns(UserWarning, match="computed by PyTorch: nested tensors have no shape"):
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), wanted)


def test_encoder_layer_follows_its_attention() -> None:
    report = flashmoe_train.swap(nn.TransformerEncoderLayer(DIM, 2, 48, dropout=0.1), dry_run=True)
    assert report.nothing() and report.rows[0].reason.startswith("its attention is left alone: its attention dropout")


@pytest.mark.parametrize(
    "options, reason", [({"dropout": 0.1}, "attention dropout is 0.1"), ({"add_zero_attn": True}, "add_zero_attn")]
)
def test_what_our_operator_lacks_is_left_alone(options: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=f"nothing was swapped in MultiheadAttention: .*{reason}"):
        flashmoe_train.swap(nn.MultiheadAttention(DIM, 2, **options))


def test_compiles_whole() -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(DIM, 2, batch_first=True), torch.randn(2, LENGTH, DIM)
    wanted = module(x, x, x, need_weights=False)[0]
    flashmoe_train.swap(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], wanted, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="computed by PyTorch: need_weights"):
        assert compiled(x, x, x)[1] is not None
