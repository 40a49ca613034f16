"""What becomes of every mask that a Transformers model may ask for: ours, or stock's with a warning, never a wrong
one."""

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

import flashmoe_train
from flashmoe_train.integrations import sdpa
from flashmoe_train.integrations.transformers.attention import attention_forward
from flashmoe_train.integrations.transformers.masks import CausalMask, make_mask

from .models import LENGTH, Calls, build, calls, check_equal, inputs, no_stock, outcome

assert calls  # a fixture

CHUNKED = chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long))


def swapped(model_type: str, **changes: object) -> nn.Module:
    model = build(model_type, **changes)
    flashmoe_train.swap(model)
    return model


def reads(function: Callable[[], object]) -> int:
    """How often the host asks for the values of a tensor: on a GPU each makes it wait."""
    names = ("aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.found += str(op).removesuffix(".default") in names
            return op(*args, **kwargs or {})

    with Count() as count:
        function()
    return count.found


# --------------------------------------------------------------------------------------------------------------- bounds


def test_bounds_of_padding() -> None:
    """Left, right, both, none at all, nothing else."""
    rows = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    mask = torch.tensor(rows, dtype=torch.bool)
    with no_stock():
        found = make_mask(5, 5, 5, attention_mask=mask)
    assert isinstance(found, CausalMask) and found.cu_seqlens_q is not None and found.cu_seqlens_k is not None
    sees = torch.zeros(25, 25, dtype=torch.bool)
    bounds = [x.tolist() for x in (found.cu_seqlens_q, found.cu_seqlens_k)]
    assert all(x.dtype == torch.int32 for x in found[1:]) and [x[0] for x in bounds] == [0, 0]
    for (q0, q1), (k0, k1) in zip(*map(itertools.pairwise, bounds), strict=True):
        sees[q0:q1, k0:k1] = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
    wanted = torch.block_diag(*(m[:, None] * m * torch.ones(5, 5).tril() for m in mask.float())).bool()
    assert torch.equal(sees, wanted)


def test_no_padding_is_no_mask() -> None:
    assert make_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool)) == CausalMask()
    assert make_mask(2, 5, 5) == CausalMask()


def test_one_document_a_sequence_is_no_mask() -> None:
    """Positions that begin anywhere, but count up."""
    model, ids = swapped("llama"), inputs("plain")["input_ids"]
    first, second = (model(input_ids=ids, position_ids=torch.arange(LENGTH)[None] + shift).logits for shift in (0, 7))
    check_equal({"logits": second}, {"logits": first})  # rotary positions are relative
    assert make_mask(2, 5, 5, allow_is_causal_skip=False) == CausalMask()


# ---------------------------------------------------------------------------------------------------------- not ours


@pytest.mark.parametrize(
    "reason, arguments",
    [
        ("keys of a cache", {"q_length": 1}),
        ("do not begin at position 0", {"q_offset": 3}),
        ("do not begin at position 0", {"q_offset": torch.tensor(0)}),
        ("padding between tokens", {"attention_mask": torch.tensor([[True, False, True, True, True]])}),
        ("attention_mask is [1, 7], not [batch, sequence] = [1, 5]", {"attention_mask": torch.ones(1, 7).bool()}),
        (
            "local, and no sliding window",
            {"local_size": 2, "mask_function": chunked_causal_mask_function(2, torch.zeros(1))},
        ),
        ("a function of its own", {"use_vmap": True, "allow_is_causal_skip": False}),
        ("is not causal", {"allow_is_bidirectional_skip": False}),
    ],
)
def test_other_masks_are_stock(reason: str, arguments: dict) -> None:
    arguments = {"batch_size": 1, "q_length": 5, "kv_length": 5, "device": torch.device("cpu")} | arguments
    with pytest.warns(UserWarning) as warned:
        found = make_mask(**arguments)
    assert any("computed by Transformers' sdpa: " in str(w.message) and reason in str(w.message) for w in warned)
    wanted = sdpa_mask(**arguments)
    assert wanted is found is None or torch.equal(found, wanted)


def test_padding_between_tokens_equals_stock() -> None:
    model, given = build("qwen3_moe"), inputs("left")
    given["attention_mask"][1, 4:6] = 0
    wanted = outcome(model, given)
    flashmoe_train.swap(model)
    with pytest.warns(UserWarning, match="sdpa: attention_mask has padding between tokens"):
        check_equal(outcome(model, given), wanted)


def test_a_mask_of_ones_own_equals_stock() -> None:
    model, given = build("llama"), inputs("plain")
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    given["attention_mask"] = (~(seen | torch.eye(LENGTH).bool())).float() * -1e9
    wanted = model(**given).logits
    flashmoe_train.swap(model)
    with pytest.warns(UserWarning, match="the mask was made elsewhere"):
        check_equal({"logits": model(**given).logits}, {"logits": wanted})


def test_bidirectional_models_are_stock() -> None:
    model = build("llama", is_causal=False)
    wanted = model(**inputs("left")).logits
    flashmoe_train.swap(model)
    with pytest.warns(UserWarning, match="the mask is not causal"):
        found = model(**inputs("left")).logits
    kept = inputs("left")["attention_mask"].bool()
    check_equal({"logits": found[kept]}, {"logits": wanted[kept]})


@pytest.mark.parametrize("padding", ["plain", "left"])
@pytest.mark.parametrize("model_type", ["mistral", "qwen3_moe", "deepseek_v3"])
def test_generation_equals_stock_and_says_so(model_type: str, padding: str, calls: Calls) -> None:
    model, given = build(model_type, use_cache=True).eval(), inputs(padding)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    wanted = model.generate(**given, **options)
    flashmoe_train.swap(model)
    with pytest.warns(UserWarning, match="there are keys of a cache, as in generation"):
        found = model.generate(**given, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    check_equal({"logits": torch.stack(found.logits)}, {"logits": torch.stack(wanted.logits)})
    # The prompt is ours, the tokens after it are not; experts always are.
    assert [name for name, _ in calls].count("attention") == model.config.num_hidden_layers


def test_a_cache_of_fixed_size_equals_stock() -> None:
    model, given = build("llama", use_cache=True).eval(), inputs("left")
    found = []
    for _ in range(2):
        cache = StaticCache(config=model.config, max_cache_len=40)
        with warnings.catch_warnings(record=True) as warned, torch.no_grad():
            warnings.simplefilter("always")
            found.append(model(**given, past_key_values=cache).logits[given["attention_mask"].bool()])
        flashmoe_train.swap(model) if len(found) == 1 else None
    assert any("keys of a cache" in str(w.message) for w in warned)
    check_equal({"logits": found[1]}, {"logits": found[0]})


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "options, text",
    [
        ({"dropout": 0.1}, "no dropout, found 0.1 in Linear"),
        ({"softcap": 30.0}, "not a cap on scores: softcap must be None"),
        ({"s_aux": torch.zeros(2)}, "not attention sinks: s_aux must be None in Linear"),
        ({"position_bias": torch.zeros(1)}, "not a bias on scores"),
        ({"is_causal": False}, "asks for is_causal=False"),
        ({"key": torch.zeros(1, 2, 9, 8), "value": torch.zeros(1, 2, 9, 8)}, "as many queries as keys, found 5 and 9"),
    ],
)
def test_what_may_not_be_ignored(options: dict, text: str) -> None:
    tensors = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 5, 8))
    with pytest.raises(ValueError, match=text):
        attention_forward(nn.Linear(1, 1), attention_mask=CausalMask(), **tensors | options)


def test_dropout_after_the_swap_is_an_error() -> None:
    model = swapped("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="in LlamaAttention"):
        model.train()(**inputs("plain"))


# ------------------------------------------------------------------------------------------------- what is said of them


def test_documents_of_flash_attention_arguments() -> None:
    """What a collator makes for flash_attention_2: without positions documents are in cu_seq_lens alone."""
    model = swapped("llama")
    ids, bounds = inputs("plain")["input_ids"].view(1, -1), torch.tensor([0, 7, 30, 2 * LENGTH])
    positions = torch.cat([torch.arange(n) for n in bounds.diff()])[None]
    wanted = model(input_ids=ids, position_ids=positions).logits
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 23, "max_length_k": 23}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    check_equal({"logits": model(**given, **lengths).logits}, {"logits": wanted})
    assert (
        model(**given).logits - wanted
    ).abs().max() > 0.1 * wanted.abs().max()  # as in stock: a mask has no documents


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("model_type, masks", [("mistral", 1), ("qwen3", 2)])  # qwen3's: full and sliding
@pytest.mark.parametrize("case, waits, theirs", [("plain", 0, 1), ("left", 1, 0), ("packed", 1, 1)])
def test_the_host_waits_once_a_mask(
    case: str, waits: int, theirs: int, model_type: str, masks: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers share it. Transformers' own wait, whether positions are packed, comes on top."""
    # On the CPU the operator reads its bounds, on a GPU it does not.
    monkeypatch.setattr(sdpa, "attention", lambda q, k, v, **options: v.repeat_interleave(2, dim=2))
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * (layers // 2)} if masks == 2 else {}
    model, given = swapped(model_type, num_hidden_layers=layers, **kinds), inputs(case)
    assert reads(lambda: model(**given)) == masks * (waits + theirs)


def test_output_attentions_says_that_there_are_none() -> None:
    mask = CausalMask()
    q = torch.randn(1, 2, 5, 8)
    with pytest.warns(UserWarning, match="output_attentions=True asks for the attention weights"):
        assert attention_forward(nn.Linear(1, 1), q, q, q, mask, output_attentions=True)[1] is None


def test_sliding_window_is_stocks() -> None:
    """The window counts the token itself."""
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    config = nn.Linear(1, 1)
    config.sliding_window = 3
    mask = make_mask(1, 9, 9, local_size=3, config=config)
    stock = sdpa_mask(1, 9, 9, mask_function=sliding_window_causal_mask_function(3), local_size=3, device="cpu")
    found = attention_forward(nn.Linear(1, 1), q, k, v, mask)[0]
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=stock).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_scale_is_the_layers(packed: bool) -> None:
    """Not always head_dim ** -0.5: DeepSeek's grows with the context."""
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
    bounds = torch.tensor([0, 9, 18], dtype=torch.int32) if packed else None
    found = attention_forward(nn.Linear(1, 1), q, k, v, CausalMask(None, bounds, bounds), scaling=0.9)[0]
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.9).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


def test_one_graph_and_padding_between_tokens_is_an_error_there() -> None:
    def tokens(mask: Tensor) -> Tensor:
        return make_mask(1, 5, 5, attention_mask=mask).cu_seqlens_k  # type: ignore[union-attr]

    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([[False, True, True, True, False]])).tolist() == [0, 0, 1, 4, 4, 5]
    with pytest.raises(RuntimeError, match="padding at the ends of sequences only"):
        compiled(torch.tensor([[False, True, False, True, False]]))
