"""Transformers' families on a GPU, on our kernels: in bfloat16 as near to float32 as stock in bfloat16 is.

Needs the package with its compiled library, transformers and pytest.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashmoe_train
from flashmoe_train.integrations.transformers import experts
from flashmoe_train.ops.attention import fallback as attention_fallback
from flashmoe_train.ops.moe import fallback as moe_fallback

from .models import ROUTED, SUPPORTED, Calls, build, calls, inputs, no_stock, outcome

assert calls  # a fixture

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SCALE = 12  # 288 tokens a sequence: more than a tile
WINDOW = {"mistral": {"sliding_window": 100}, "qwen3": {"sliding_window": 100}}
# Every expert of every token: in bfloat16 two ways may choose another expert for a token whose choices are nearly tied,
# and then differ by more than rounding. Sparse routing is compared below, on one routing.
ALL_EXPERTS = {
    "qwen3_moe": {"num_experts_per_tok": 8},
    "mixtral": {"num_experts_per_tok": 4},
    "olmoe": {"num_experts_per_tok": 8},
    "deepseek_v3": {"num_experts_per_tok": 8, "topk_group": 4},
}


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would not run on our kernels is an error."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("PyTorch's kernels instead of ours")

    for module, name in ((attention_fallback, "attention"), (moe_fallback, "moe")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def model_of(model_type: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
    return build(model_type, **WINDOW.get(model_type, {}) | changes).to(DEVICE, dtype)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, in the Frobenius norm."""
    return {name: ((found[name].double() - x.double()).norm() / x.double().norm()).item() for name, x in exact.items()}


def check_rounding(ours: dict[str, Tensor], stock: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Ours may be twice as far off as stock is, in the same type: both are rounding."""
    of_ours, of_stock = errors(ours, exact), errors(stock, exact)
    for name, error in of_ours.items():
        assert error <= 2 * of_stock[name] + 1e-3, f"{name}: {error:.2e}, stock {of_stock[name]:.2e}"


@pytest.mark.parametrize("case", ["plain", "left", "right", "both", "packed"])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_equals_stock_but_for_rounding(model_type: str, case: str, calls: Calls) -> None:
    given, changes = inputs(case, DEVICE, SCALE), ALL_EXPERTS.get(model_type, {})
    stock, exact = (outcome(model_of(model_type, dtype, **changes), given) for dtype in (torch.bfloat16, torch.float32))
    model = model_of(model_type, torch.bfloat16, **changes)
    flashmoe_train.swap(model)
    with no_stock():
        ours = outcome(model, given)
    assert [name for name, _ in calls].count("attention") == 2
    assert not any(torch.isnan(x).any() for x in ours.values())
    check_rounding(ours, stock, exact)


@pytest.mark.parametrize("model_type", ROUTED)
def test_sparse_experts_on_one_routing(model_type: str) -> None:
    """The experts of a layer, where most of them compute few tokens."""

    def gradients(dtype: torch.dtype, implementation: str) -> dict[str, Tensor]:
        model = model_of(model_type, dtype)
        model.config._experts_implementation = implementation
        (module, *_) = (module for module in model.modules() if experts.is_experts(module))
        torch.manual_seed(1)
        x = torch.randn(500, model.config.hidden_size).to(DEVICE, dtype).requires_grad_()
        scores = torch.randn(500, module.num_experts)
        weights, ids = (choice.to(DEVICE) for choice in scores.softmax(1).topk(2))
        weights = weights.to(torch.bfloat16).to(dtype).requires_grad_()
        out = module(x, ids, weights)
        leaves = {"x": x, "weights": weights} | dict(module.named_parameters())
        found = torch.autograd.grad(
            out, list(leaves.values()), torch.randn(500, model.config.hidden_size).to(DEVICE, dtype)
        )
        return {"out": out.detach()} | dict(zip(leaves, found, strict=True))

    ours = gradients(torch.bfloat16, "flashmoe")
    check_rounding(ours, gradients(torch.bfloat16, "eager"), gradients(torch.float32, "eager"))


@pytest.mark.parametrize("case", ["plain", "left", "packed"])
def test_layers_do_not_wait_for_the_device(case: str) -> None:
    """Nor does backward: a model of six layers makes the host wait as often as one of two."""

    def waits(layers: int) -> int:
        model, given = model_of("qwen3_moe", torch.bfloat16, num_hidden_layers=layers), inputs(case, DEVICE, SCALE)
        flashmoe_train.swap(model)
        model(**given).logits.sum().backward()  # whatever is set up once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                model(**given).logits.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in warned)

    few, many = waits(2), waits(6)
    assert few == many <= {"plain": 1, "left": 1, "packed": 2}[case]


@pytest.mark.parametrize("model_type, case", [("qwen3_moe", "packed"), ("mistral", "left")])
def test_compiles_whole(model_type: str, case: str) -> None:
    given, changes = inputs(case, DEVICE, SCALE), ALL_EXPERTS.get(model_type, {})
    stock, exact = (outcome(model_of(model_type, dtype, **changes), given) for dtype in (torch.bfloat16, torch.float32))
    model = model_of(model_type, torch.bfloat16, **changes)
    flashmoe_train.swap(model)
    with no_stock():
        ours = outcome(torch.compile(model, fullgraph=True), given)
    check_rounding({name.removeprefix("_orig_mod."): x for name, x in ours.items()}, stock, exact)


def test_generation_equals_stock_but_for_rounding() -> None:
    """The prompt on our kernel, what follows on stock's: the logits of the first token."""
    given = inputs("left", DEVICE, SCALE)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def first_logits(model: nn.Module) -> dict[str, Tensor]:
        return {"logits": model.eval().generate(**given, **options).logits[0]}

    stock, exact = (first_logits(model_of("llama", dtype, use_cache=True)) for dtype in (torch.bfloat16, torch.float32))
    model = model_of("llama", torch.bfloat16, use_cache=True)
    flashmoe_train.swap(model)
    with pytest.warns(UserWarning, match="there are keys of a cache"):
        ours = first_logits(model)
    check_rounding(ours, stock, exact)
