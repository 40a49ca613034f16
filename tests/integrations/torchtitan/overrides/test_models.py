"""Framework-neutral sizes give the models that TorchTitan 0.3.x calls by the same names."""

import pytest
import torch
from torchtitan.models.common import RMSNorm
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.overrides import models
from flashmoe_train.schema import Model

from ..sizes import REFUSED, sizes


def built(model: Model):
    return models.spec(*models.register(model, document_masks=True, exact=False)).model


@pytest.mark.parametrize(
    "config, name, flavor",
    [("qwen3_30b_a3b", "qwen3", "30B-A3B"), ("deepseek_v3_16b", "deepseek_v3", "16B"), ("llama3_8b", "llama3", "8B")],
)
def test_equals_torchtitans_own(config: str, name: str, flavor: str) -> None:
    ours, theirs = built(sizes(config)), models.spec(name, flavor).model
    assert models.sizes(models.spec(name, models.FLAVOR)) == models.sizes(models.spec(name, flavor))
    for kind in (TokenChoiceTopKRouter, RMSNorm):
        mine, wanted = ([c for _, c, _, _ in x.traverse(kind.Config)][:8] for x in (ours, theirs))
        for a, b in zip(mine, wanted, strict=True):
            assert {k: v for k, v in a.to_dict().items() if k != "gate"} == {
                k: v for k, v in b.to_dict().items() if k != "gate"
            }
    for a, b in zip(ours.layers[1:3], theirs.layers[1:3], strict=True):
        ropes = [{**x.attention.rope.to_dict(), "max_seq_len": 0} for x in (a, b)]
        assert ropes[0] == ropes[1]
    shapes = []
    for model in (ours, theirs):
        model.layers = model.layers[:2]
        for layer in model.layers:
            layer.attention.rope.max_seq_len = 16
        with torch.device("meta"):
            shapes.append({key: p.shape for key, p in model.build().named_parameters()})
    assert shapes[0] == shapes[1]


def test_sizes_that_no_flavor_has() -> None:
    moe = "num_experts = 8\nnum_experts_per_tok = 2\nmoe_intermediate_size = 32\nn_shared_experts = 1\nn_group = 4"
    found = built(
        sizes("qwen3_moe_debug", f'rms_norm_eps = 1e-3\n[moe]\n{moe}\ntopk_group = 2\nscoring_func = "sigmoid"')
    )
    router = found.layers[0].moe.router
    assert (router.score_func, router.num_expert_groups, router.num_limited_groups) == ("sigmoid", 4, 2)
    assert found.layers[0].moe.shared_experts.w1.out_features == 32
    assert {norm.eps for _, norm, _, _ in found.traverse(RMSNorm.Config)} == {1e-3}
    moe = "num_experts = 8\nnum_experts_per_tok = 2\nmoe_intermediate_size = 32"
    assert built(sizes("deepseek_v3_debug", f"[moe]\n{moe}")).layers[1].moe.shared_experts is None


@pytest.mark.parametrize("config, changes, text", REFUSED)
def test_refuses_what_torchtitan_does_not_have(config: str, changes: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        built(sizes(config, changes))
