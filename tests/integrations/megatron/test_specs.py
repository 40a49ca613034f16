"""`swap` in a script of one's own: specifications by Megatron's builders, and what is said of others."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.integrations.megatron import specs, swap
from flashmoe_train.integrations.megatron.attention import FlashMoEAttention
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
from flashmoe_train.integrations.megatron.layer import FlashMoELayer
from flashmoe_train.integrations.megatron.norm import Norm


def config(**options: Any) -> TransformerConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**sizes | options)


def with_experts(**options: Any) -> TransformerConfig:
    return config(num_moe_experts=4, moe_ffn_hidden_size=24, moe_token_dispatcher_type="alltoall", **options)


def build(given: TransformerConfig, spec: Any) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel(given, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope")


def loss(model: GPTModel) -> torch.Tensor:
    tokens = torch.arange(34).view(2, 17) % 64
    positions = torch.arange(16).expand(2, -1)
    mask = ~torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    return model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous()).mean()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_two_lines_in_a_script(experts: bool, block: bool) -> None:
    given = with_experts() if experts else config()
    if block:
        spec = get_gpt_decoder_block_spec(given, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = get_gpt_layer_local_spec(num_experts=given.num_moe_experts, normalization="RMSNorm")
    swapped = swap(spec, given)
    assert type(swapped) is type(spec)
    stock, ours = build(given, spec), build(given, swapped)
    wanted, found = loss(stock), loss(ours)
    torch.testing.assert_close(found, wanted)
    for value in (wanted, found):
        value.backward()
    pairs = zip(stock.decoder.layers, ours.decoder.layers, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b.self_attention.linear_qkv.weight.grad, a.self_attention.linear_qkv.weight.grad)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    became = {(row.found, row.became) for row in specs.report(ours).rows}
    assert ("DotProductAttention", "FlashMoEAttention") in became
    assert (("SequentialMLP", "FlashMoEExperts") in became) == experts
    assert not specs.report(stock).rows  # swap changes a copy


def test_one_part_alone() -> None:
    spec = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
    found = swap(spec, with_experts(), moe="stock").submodules
    assert found.self_attention.submodules.core_attention is FlashMoEAttention and found.mlp.module is MoELayer
    found = swap(spec, with_experts(), attention="stock").submodules
    assert found.self_attention.submodules.core_attention is DotProductAttention
    assert found.mlp.module is FlashMoELayer and found.mlp.submodules.experts is FlashMoEExperts
    assert found.input_layernorm is WrappedTorchNorm


@pytest.mark.usefixtures("alone")
def test_norms_under_sequence_parallelism() -> None:
    given = config(tensor_model_parallel_size=2, sequence_parallel=True, qk_layernorm=True)
    found = swap(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True), given)
    assert isinstance(found, TransformerBlockSubmodules) and len(found.layer_specs) == 2 and found.layer_norm is Norm
    parts = found.layer_specs[0].submodules
    assert parts.input_layernorm is parts.pre_mlp_layernorm is parts.self_attention.submodules.q_layernorm is Norm
    norm = Norm(given, 8, eps=1e-3)
    assert norm.weight.sequence_parallel is True and norm.eps == 1e-3 and isinstance(norm, torch.nn.RMSNorm)
    given.layernorm_zero_centered_gamma = True
    with pytest.raises(UsageError, match="layernorm_zero_centered_gamma"):
        Norm(given, 8)


def test_specifications_by_partial() -> None:
    """As Megatron's main branch has them."""
    spec = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
    spec.submodules.mlp = functools.partial(MoELayer, submodules=spec.submodules.mlp.submodules)
    mlp = swap(spec, with_experts()).submodules.mlp
    assert mlp.func is FlashMoELayer and mlp.keywords["submodules"].experts is FlashMoEExperts
    assert "sharing" not in mlp.keywords
    mlp = swap(spec, with_experts(expert_model_parallel_size=2), dispatch="flashmoe", dispatch_tokens=8).submodules.mlp
    assert mlp.keywords["sharing"] == Sharing(8, None)


def test_mistakes_are_named() -> None:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    with pytest.raises(UsageError, match="attention must be one of 'flashmoe', 'stock', found 'flash'"):
        swap(spec, config(), attention="flash")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r'dispatch = "flashmoe" .* needs moe = "flashmoe", found "stock"'):
        swap(spec, config(), moe="stock", dispatch="flashmoe")
    with pytest.raises(UsageError, match='found 0 with dispatch = "flashmoe"'):
        swap(spec, config(), dispatch="flashmoe", dispatch_tokens=0)
    with pytest.raises(UsageError, match="found MLP"):
        swap(spec.submodules.mlp, config())
    with pytest.raises(UsageError, match="nothing was swapped"):
        swap(spec, config(), attention="stock")
    with pytest.raises(UsageError, match=r"attention_dropout = 0\.1"):
        swap(spec, config(attention_dropout=0.1))
    experts = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
    with pytest.raises(UsageError, match="no bias"):
        swap(experts, with_experts(add_bias_linear=True))
