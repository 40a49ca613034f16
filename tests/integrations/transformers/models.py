"""Small models of every family, the inputs they are compared on, and the comparison."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashmoe_train.integrations import sdpa
from flashmoe_train.integrations.transformers import experts, small
from flashmoe_train.integrations.transformers.families import FAMILIES

SUPPORTED = [family.model_type for family in FAMILIES if family.attention_why_not is None]
ROUTED = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"]
LENGTH = 24


def build(model_type: str, **changes: Any) -> nn.Module:
    """A small model by Transformers' own eager attention and experts, the plainest of what is stock."""
    model = small.build(model_type, **{"use_cache": False} | changes)
    model.config._attn_implementation = model.config._experts_implementation = "eager"
    return model


def inputs(case: str, device: str = "cpu", scale: int = 1) -> dict[str, Tensor]:
    """Two sequences: as they are, the first of them padded on one side or both, or of several documents each. `scale`
    makes all lengths that many times as long."""
    ids = torch.randint(3, 96, (2, LENGTH * scale), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids}
    place = torch.arange(LENGTH * scale) // scale
    padded = {"left": place >= 9, "right": place < 15, "both": (place >= 3) & (place < 20)}
    if (kept := padded.get(case)) is not None:
        given["attention_mask"] = torch.stack([kept, torch.ones_like(kept)]).long()
    elif case == "packed":
        given["position_ids"] = torch.stack(
            [
                torch.cat([torch.arange(n * scale) for n in lengths]) for lengths in ((5, 1, 18), (11, 13))
            ]  # of documents
        )
    else:
        assert case == "plain"
    return {name: tensor.to(device) for name, tensor in given.items()}


def outcome(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of what is no padding, and the gradients of every parameter from them."""
    model.zero_grad(set_to_none=True)
    logits = model(**given).logits
    logits = logits[given["attention_mask"].bool()] if "attention_mask" in given else logits.flatten(0, 1)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    (logits * weight).sum().backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.clone()
    return found


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the largest deviation, as a part of its largest entry."""
    assert found.keys() == wanted.keys()
    return {
        name: ((found[name].double() - want.double()).abs().max() / want.double().abs().max()).item()
        for name, want in wanted.items()
    }


def check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-4) -> None:
    for name, value in difference(found, wanted).items():
        assert value <= bound, f"{name}: {value:.1e}"


@contextmanager
def no_stock() -> Iterator[None]:
    """An error where attention goes back to Transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attention is computed by Transformers")
        yield


class Calls(list):
    """What our operators were called with."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()

    def spied(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Tensor, **options: Any) -> Tensor:
            found.append((name, options))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(sdpa, "attention", spied("attention", sdpa.attention))
    monkeypatch.setattr(experts, "moe", spied("moe", experts.moe))
    return found
