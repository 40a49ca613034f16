"""Swapped modules compute what stock computes: documents as flex attention, the MoE block in every configuration."""

import dataclasses
import types

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flashmoe_train.integrations.torchtitan.converters import attention, moe
from flashmoe_train.swap import swap_modules

from ...ops.operators import Copied, CountOperators

VOCABULARY, EOS = 64, 3


def small(family: str, attn_type: str, mask_type: str = "block_causal"):
    """A two-layer model of a TorchTitan family with the attention that is asked for."""
    if family == "llama3":
        from torchtitan.models.llama3 import Transformer as Model
        from torchtitan.models.llama3 import llama3_args as flavors
    elif family == "qwen3":
        from torchtitan.models.qwen3 import Qwen3Model as Model
        from torchtitan.models.qwen3 import qwen3_args as flavors
    else:
        from torchtitan.models.deepseek_v3 import DeepSeekV3Model as Model
        from torchtitan.models.deepseek_v3 import deepseekv3_args as flavors
    sizes = {"n_layers": 2, "vocab_size": VOCABULARY, "dim": 64, "max_seq_len": 40}
    sizes |= {"n_heads": 4, "n_kv_heads": 2} if family != "deepseek_v3" else {"n_heads": 2}
    flavor = dataclasses.replace(flavors["debugmodel"], attn_type=attn_type, attn_mask_type=mask_type, **sizes)
    flavor.moe_impl = "standard"  # set by update_from_config in a run
    return initialised(Model(flavor))


def initialised(module: torch.nn.Module, **arguments) -> torch.nn.Module:
    with torch.no_grad():
        module.init_weights(buffer_device=torch.device("cpu"), **arguments)
    return module


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock compiles flex attention and its masks, which has no CPU backward; uncompiled it runs."""
    monkeypatch.setattr("torchtitan.models.attention._compiled_create_block_mask", create_block_mask)
    monkeypatch.setattr(
        "torchtitan.models.attention.FlexAttentionWrapper._compiled_flex_attn", staticmethod(flex_attention)
    )


@pytest.mark.parametrize("mask_type", ["block_causal", "causal"])
@pytest.mark.parametrize("family", ["llama3", "deepseek_v3", "qwen3"])
def test_document_masks_equal_flex_attention(family: str, mask_type: str, eager_flex: None) -> None:
    model = small(family, "flex", mask_type)
    tokens = torch.randint(EOS + 1, VOCABULARY, (2, 40))
    tokens[0, [7, 8, 25]] = tokens[1, [0, 39]] = EOS
    tokenizer = types.SimpleNamespace(eos_id=EOS)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, attention_masks=model.get_attention_masks(tokens, tokenizer))

    stock = logits()
    report = swap_modules(model, attention.swaps(model))
    assert [row.became for row in report.rows] == [f"FlashMoE{row.found}" for row in report.rows[:1]] + [
        "FlashMoEDocumentAttention"
    ] * 2
    torch.testing.assert_close(logits(), stock, rtol=1e-4, atol=1e-4)
    report.revert()
    torch.testing.assert_close(logits(), stock, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_varlen_equals_document_masks(family: str) -> None:
    """Stock's varlen attention has no CPU kernel: the same weights under flex masks are the yardstick."""
    torch.manual_seed(1)
    models = small(family, "flex"), small(family, "varlen")
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(VOCABULARY, (2, 40))
    results = []
    for model in models:
        swap_modules(model, attention.swaps(model))
        masks = model.get_attention_masks(tokens, types.SimpleNamespace(eos_id=EOS))
        results.append(model(tokens, attention_masks=masks))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_before_experts": True},
        {"num_shared_experts": 1},
        {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5},
        {"num_expert_groups": 4, "num_limited_groups": 2},
        {"load_balance_coeff": None},
        {"_debug_force_load_balance": True},
    ],
    ids=str,
)
def test_moe_block_equals_stock(changes: dict) -> None:
    from torchtitan.models.moe import MoE, MoEArgs

    defaults = {"num_experts": 8, "top_k": 3, "num_shared_experts": 0, "score_before_experts": False}
    # The for-loop experts compute in float32; grouped_mm would round to bfloat16.
    arguments = MoEArgs(**{**defaults, **changes}, use_grouped_mm=False)
    block = initialised(MoE(arguments, dim=16, hidden_dim=24), init_std=0.5)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(2)
        block.tokens_per_expert.zero_()
        x = torch.randn(2, 11, 16, requires_grad=True)
        out = block(x)
        grads = torch.autograd.grad(out.square().sum(), (x, *block.parameters()))
        return [out.detach(), block.tokens_per_expert.clone(), *grads]

    stock = run()
    assert len(swap_modules(block, moe.swaps(block)).rows) == 2
    for found, wanted in zip(run(), stock, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_moe_block_routes_everything_in_one_operator() -> None:
    """Without parallelism gather and combine are the operator's: nothing is permuted outside it."""
    from torchtitan.models.moe import MoE, MoEArgs

    block = initialised(MoE(MoEArgs(score_before_experts=False), dim=16, hidden_dim=24), init_std=0.5)
    swap_modules(block, moe.swaps(block))
    with CountOperators() as counter:
        block(torch.randn(2, 5, 16)).sum().backward()
    assert counter.counts["moe_forward"] == counter.counts["moe_down_backward"] == counter.counts["route_plan"] == 1


@pytest.mark.parametrize("family", ["llama3", "qwen3", "deepseek_v3"])
def test_equals_stock_under_autocast(family: str) -> None:
    """A single GPU trains under autocast: whatever dtypes a model hands over, attention and experts compute in its."""
    model = small(family, "sdpa")
    tokens = torch.randint(VOCABULARY, (2, 40))

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        return [logits, *torch.autograd.grad(logits.float().logsumexp(-1).mean(), tuple(model.parameters()))]

    stock = run()
    swap_modules(model, attention.swaps(model))
    swap_modules(model, moe.swaps(model), optional=True)
    for found, wanted in zip(run(), stock, strict=True):
        assert found.dtype == wanted.dtype
        error = (found - wanted).float().norm() / wanted.float().norm().clamp(min=1e-6)
        assert error < 0.05, error


@pytest.mark.parametrize("attn_type", ["sdpa", "flex"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "deepseek_v3"])
def test_attention_kernel_reads_in_place(family: str, attn_type: str) -> None:
    model = small(family, attn_type)
    swap_modules(model, attention.swaps(model))
    tokens = torch.randint(VOCABULARY, (2, 40))
    tokens[0, 7] = EOS
    masks = {}
    if attn_type == "flex":
        masks["attention_masks"] = model.get_attention_masks(tokens, types.SimpleNamespace(eos_id=EOS))
    with torch.autocast("cpu", torch.bfloat16), Copied() as copied:
        model(tokens, **masks)
    assert copied.calls == [{}, {}]  # one a layer


def test_document_masks_compile_for_every_number_of_documents() -> None:
    model = small("llama3", "flex")
    swap_modules(model, attention.swaps(model))
    compiled = torch.compile(model.layers["0"].attention, fullgraph=True, dynamic=True)
    x, rope = torch.randn(2, 40, 64), model.freqs_cis
    for documents in (0, 3, 7, 12):
        tokens = torch.full((2, 40), EOS + 1)
        tokens[0, 3 : 3 + documents] = EOS
        mask = model.get_attention_masks(tokens, types.SimpleNamespace(eos_id=EOS))
        with torch._dynamo.config.patch(error_on_recompile=documents > 3):  # one and several may differ, no more
            found = compiled(x, rope, mask)
        torch.testing.assert_close(found, model.layers["0"].attention(x, rope, mask))
