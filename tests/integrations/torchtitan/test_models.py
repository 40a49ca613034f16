"""Framework-neutral sizes give the models that TorchTitan calls by the same names."""

import dataclasses
from typing import Any

import pytest
import torch
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.converters import models
from flashmoe_train.schema import Model

from .sizes import REFUSED, sizes


def arguments(model: Model, **choices: bool) -> Any:
    name, flavor = models.register(model, **{"document_masks": False, "exact": False} | choices)
    return get_train_spec(name).model_args[flavor]


def build(model_name: str, arguments: Any) -> dict[str, torch.Size]:
    arguments.update_from_config(JobConfig())
    with torch.device("meta"):
        model = get_train_spec(model_name).model_cls(arguments)
    return {name: p.shape for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "config, name, flavor, document_masks",
    [
        ("qwen3_30b_a3b", "qwen3", "30B-A3B", False),
        ("deepseek_v3_16b", "deepseek_v3", "16B", True),
        ("llama3_8b", "llama3", "8B", False),
    ],
)
def test_equals_torchtitans_own(config: str, name: str, flavor: str, document_masks: bool) -> None:
    ours = arguments(sizes(config), document_masks=document_masks)
    theirs = get_train_spec(name).model_args[flavor]
    different = {f.name for f in dataclasses.fields(theirs) if getattr(ours, f.name) != getattr(theirs, f.name)}
    # The length is the training's. TorchTitan says how wide llama3's MLP is by a rule, we by a number.
    assert different <= {"max_seq_len", "ffn_dim_multiplier", "multiple_of"}
    cut = {"n_layers": 2}
    assert build(name, dataclasses.replace(ours, **cut)) == build(name, dataclasses.replace(theirs, **cut))


@pytest.mark.parametrize(
    "hidden, width", [(256, 768), (256, 257), (4096, 14336), (5120, 13824), (96, 1), (7168, 18432)]
)
def test_llama3_gets_the_width_that_is_asked_for(hidden: int, width: int) -> None:
    found = arguments(sizes("llama3_debug", f"hidden_size = {hidden}\nintermediate_size = {width}"))
    assert build("llama3", found)["layers.0.feed_forward.w1.weight"] == (width, hidden)


def test_without_scaling_rotary_frequencies_are_the_plain_ones() -> None:
    from torchtitan.models.llama3.model.model import precompute_freqs_cis

    found = arguments(sizes("llama3_debug"))
    t, dim = torch.arange(64).float(), 64
    plain = torch.outer(t, found.rope_theta ** (-torch.arange(0, dim, 2).float() / dim))
    scaled = precompute_freqs_cis(dim, 64, found.rope_theta, found.rope_scaling_args)
    torch.testing.assert_close(scaled, torch.polar(torch.ones_like(plain), plain), rtol=1e-5, atol=1e-5)


def test_exact_experts_do_not_round() -> None:
    assert arguments(sizes("qwen3_moe_debug")).moe_args.use_grouped_mm
    assert not arguments(sizes("qwen3_moe_debug"), exact=True).moe_args.use_grouped_mm


@pytest.mark.parametrize("config, changes, text", REFUSED)
def test_refuses_what_torchtitan_does_not_have(config: str, changes: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        arguments(sizes(config, changes))
