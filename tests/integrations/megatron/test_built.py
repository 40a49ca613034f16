"""`flashmoe_train.swap` on models by Megatron's own GPTModel: what stock computes, and what is left alone."""

import types
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import experts as stock_experts
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

import flashmoe_train
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import built, compat
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
from flashmoe_train.integrations.megatron.layer import FlashMoELayer, LocalDispatcher

from .test_specs import build, config, loss, with_experts

pytestmark = pytest.mark.usefixtures("alone")
ATTENTION, LAYER = "decoder.layers.*.self_attention.core_attention", "decoder.layers.*.mlp"


def stock(given: TransformerConfig) -> GPTModel:
    compat.apply()
    spec = get_gpt_decoder_block_spec(given, use_transformer_engine=False, normalization="RMSNorm")
    return build(given, spec)


def gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    """By stock's names."""
    found = {name: p.grad for name, p in model.named_parameters() if not name.endswith((".w1", ".w2", ".w3"))}
    for name, module in model.named_modules():
        if isinstance(module, FlashMoEExperts):
            for e in range(module.num_local_experts):
                expert = f"{name}.local_experts.{e}"
                found[f"{expert}.linear_fc1.weight"] = torch.cat([module.w1.grad[e], module.w3.grad[e]])
                found[f"{expert}.linear_fc2.weight"] = module.w2.grad[e]
    return found


@pytest.mark.parametrize(
    "given",
    [
        config(),
        config(apply_query_key_layer_scaling=True, window_size=(4, 0)),
        with_experts(),
        with_experts(moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=16, qk_layernorm=True),
    ],
)
def test_computes_as_stock(given: TransformerConfig) -> None:
    wanted, ours = stock(given), stock(given)
    before, random = {k: v for k, v in ours.state_dict().items() if v is not None}, torch.get_rng_state()
    before = {k: v.clone() for k, v in before.items() if torch.is_tensor(v)}
    planned = flashmoe_train.swap(ours, dry_run=True)
    assert not any(isinstance(module, FlashMoELayer) for module in ours.modules())
    report = flashmoe_train.swap(ours)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.rows == planned.rows and all(row.became for row in report.rows)
    routed = sum(isinstance(module, MoELayer) for module in wanted.modules())
    assert routed == {None: 0}.get(given.num_moe_experts, 2 if given.moe_layer_freq == 1 else 1)
    counts = {(modules, became): count for modules, _, became, count in report.summary()}
    assert counts == {(ATTENTION, "FlashMoEAttention"): 2} | (
        {(LAYER, "FlashMoELayer"): routed, (f"{LAYER}.experts", "FlashMoEExperts"): routed} if routed else {}
    )
    dispatchers = [m.token_dispatcher for m in ours.modules() if isinstance(m, FlashMoELayer)]
    assert all(isinstance(dispatcher, LocalDispatcher) for dispatcher in dispatchers)
    after = ours.state_dict()
    assert after.keys() == wanted.state_dict().keys() and all(torch.equal(after[k], v) for k, v in before.items())
    losses = [loss(model) for model in (wanted, ours)]
    torch.testing.assert_close(*losses)
    for one in losses:
        one.backward()
    found, expected = gradients(ours), {name: p.grad for name, p in wanted.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]) if gradient is None else gradient)
    with pytest.raises(UsageError, match=r"nothing was swapped in GPTModel: .*swapped already"):
        flashmoe_train.swap(ours)


def test_revert_keeps_what_was_learnt() -> None:
    model = stock(with_experts())
    report = flashmoe_train.swap(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    wanted, state = loss(model), model.state_dict()
    report.revert()
    kinds = {type(module) for module in model.modules()}
    assert {DotProductAttention, MoELayer, SequentialMLP} <= kinds and FlashMoEExperts not in kinds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if torch.is_tensor(value))
    torch.testing.assert_close(loss(model), wanted)


def test_one_part_alone() -> None:
    rows = flashmoe_train.swap(stock(with_experts()), experts="stock").rows
    assert {row.became for row in rows} == {"FlashMoEAttention"}
    rows = flashmoe_train.swap(stock(with_experts()), attention="stock").rows
    assert {row.became for row in rows} == {"FlashMoELayer", "FlashMoEExperts"}


def test_comes_before_data_parallelism_and_the_optimizer() -> None:
    given = with_experts()
    model = stock(given)
    report = flashmoe_train.swap(model)
    options = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(given, options, model)
    before = model.decoder.layers[1].mlp.experts.w2.detach().clone()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=0.1, min_lr=0.0, use_distributed_optimizer=True, params_dtype=torch.float32), [wrapped]
    )
    loss(wrapped).backward()
    wrapped.finish_grad_sync()
    assert optimizer.step()[0]
    assert not torch.equal(model.decoder.layers[1].mlp.experts.w2, before)
    with pytest.raises(UsageError, match=r"revert comes before .* has a main_grad"):
        report.revert()
    for late in (wrapped, stock_with_main_parameters(given)):
        with pytest.raises(UsageError, match=r"swap comes before data parallelism and the optimizer.* has a main_"):
            flashmoe_train.swap(late)


def stock_with_main_parameters(given: TransformerConfig) -> GPTModel:
    """As an optimizer of Megatron's marks it."""
    model = stock(given)
    weight = model.decoder.final_layernorm.weight
    weight.main_param = weight.detach().float()
    return model


class Other(SequentialMLP): ...


def _derive(model: GPTModel) -> None:
    model.decoder.layers[0].mlp.experts.__class__ = Other
    model.decoder.layers[0].self_attention.core_attention.__class__ = type("Own", (DotProductAttention,), {})


def _hook(model: GPTModel) -> None:
    model.decoder.layers[0].mlp.experts.local_experts[0].register_forward_hook(lambda *args: None)
    model.decoder.layers[0].self_attention.core_attention.register_forward_hook(lambda *args: None)


def _adapt(model: GPTModel) -> None:
    model.decoder.layers[0].mlp.experts.local_experts[2].linear_fc1.__class__ = type(
        "Adapted", (ColumnParallelLinear,), {}
    )


def _freeze(model: GPTModel) -> None:
    model.decoder.layers[0].mlp.experts.local_experts[1].requires_grad_(False)


@pytest.mark.parametrize(
    "options, change, reasons",
    [
        ({"attention_dropout": 0.1, "add_bias_linear": True}, None, ["attention_dropout = 0.1", "they have no bias"]),
        ({}, _derive, ["a class derived from what is swapped", "its experts are a Other, not a SequentialMLP"]),
        ({}, _hook, ["registered on its DotProductAttention", "registered on its MLP, which would not be called"]),
        ({}, _adapt, ["an expert has a Adapted where a ColumnParallelLinear is stock's"]),
        ({}, _freeze, ["some of its experts' weights are frozen"]),
    ],
)
def test_what_is_left_alone(options: dict[str, Any], change: Any, reasons: list[str]) -> None:
    model = stock(with_experts(num_layers=1, **options))
    if change is not None:
        change(model)
    report = flashmoe_train.swap(model, dry_run=True)
    left = [row.reason for row in report.rows if row.became is None]
    assert len(left) == len(reasons) and all(text in reason for text, reason in zip(reasons, left, strict=True)), left


def test_experts_in_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """GroupedMLP, with products in place of those of a package that needs a GPU."""

    def gmm(rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool) -> torch.Tensor:
        parts = rows.split(counts.tolist())
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])

    gg = types.SimpleNamespace(ops=types.SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=lambda: None)
    monkeypatch.setattr(stock_experts, "gg", gg)
    monkeypatch.setattr(stock_experts, "jit_fuser", lambda function: function)  # or it takes seconds to compile
    model = stock(with_experts(num_layers=1, bf16=True, params_dtype=torch.bfloat16))
    layer = model.decoder.layers[0].mlp
    grouped = layer.experts = GroupedMLP(4, layer.config, get_default_pg_collection())
    x, counts, probs = torch.randn(12, 32).bfloat16(), torch.tensor([3, 0, 5, 4]), torch.rand(12)
    wanted, weights = grouped(x, counts, probs)[0], [p.detach().clone() for p in grouped.parameters()]
    report = flashmoe_train.swap(model, attention="stock")
    assert ("decoder.layers.*.mlp.experts", "GroupedMLP", "FlashMoEExperts", 1) in report.summary()
    torch.testing.assert_close(layer.experts(x, counts, probs)[0], wanted, rtol=2e-2, atol=1e-4)
    report.revert()
    assert layer.experts is grouped
    assert all(torch.equal(a, b) for a, b in zip(grouped.parameters(), weights, strict=True))


def test_a_version_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "_GROUPED", None)
    assert all(row.became for row in flashmoe_train.swap(stock(with_experts()), dry_run=True).rows)
    assert flashmoe_train.swap(nn.Linear(1, 1), dry_run=True).nothing()
