"""The load of experts, counted through TorchTitan's own blocks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchtitan.models.moe.moe import MoE, MoEArgs

from flashmoe_train.integrations.torchtitan.converters import moe
from flashmoe_train.integrations.torchtitan.expert_load import ExpertLoad
from flashmoe_train.swap import swap_modules

from ... import processes

EXPERTS, TOP_K, TOKENS = 8, 3, 32


def blocks(swapped: bool) -> nn.ModuleDict:
    arguments = MoEArgs(EXPERTS, 0, top_k=TOP_K, use_grouped_mm=False, score_before_experts=False)
    layers = nn.ModuleDict({name: MoE(arguments, dim=16, hidden_dim=8) for name in ("a", "b")})
    for layer in layers.values():
        with torch.no_grad():
            layer.init_weights(0.02, torch.device("cpu"))
        layer.tokens_per_expert.fill_(100.0)  # of earlier steps, which do not count
    if swapped:
        swap_modules(layers, moe.swaps(layers))
    return layers


def steer(block: MoE, favourite: int) -> None:
    """All tokens choose `favourite` and the two experts after it."""
    block.expert_bias.zero_()
    for i, bias in enumerate((3.0, 2.0, 1.0)):
        block.expert_bias[(favourite + i) % EXPERTS] = bias * 10


def run(load: ExpertLoad, layers: nn.ModuleDict, times: int = 1) -> None:
    x = torch.randn(2, TOKENS // 2, 16)
    before = load.counts()
    for _ in range(times):
        for layer in layers.values():
            layer(x)
    load.add(before, TOKENS)


@pytest.mark.parametrize("swapped", [False, True])
def test_busiest_expert_of_the_most_uneven_layer(swapped: bool) -> None:
    layers = blocks(swapped)
    load = ExpertLoad([layers], [])
    steer(layers["a"], 0)
    layers["b"].expert_bias = None
    run(load, layers)
    run(load, layers)
    found = load.take()
    assert found["expert_load/a"] == pytest.approx(EXPERTS / TOP_K)  # 3 of 8 experts share all
    assert 1 <= found["expert_load/b"] < found["expert_load/a"] == found["expert_load/max_over_mean"]
    assert found["expert_load/dropped_rows"] == 0
    assert load.take() == {}


def test_recomputation_is_not_load_and_lost_rows_are_counted() -> None:
    layers = blocks(swapped=True)
    load = ExpertLoad([layers], [])
    run(load, layers, times=2)  # as activation checkpointing does
    assert load.take()["expert_load/dropped_rows"] == 0
    before = load.counts()
    for layer in layers.values():
        layer(torch.randn(1, TOKENS, 16))
    layers["b"].tokens_per_expert[layers["b"].tokens_per_expert.argmax()] -= 5
    load.add(before, TOKENS)
    assert load.take()["expert_load/dropped_rows"] == 5


def _in_each_process() -> None:
    layers = blocks(swapped=True)
    load = ExpertLoad([layers], [dist.group.WORLD])
    for layer in layers.values():
        steer(layer, 3 * dist.get_rank())  # other experts in each process: over both the load is more even
    run(load, layers)
    found = load.take()
    assert found["expert_load/max_over_mean"] == pytest.approx(EXPERTS / TOP_K / 2)
    assert found["expert_load/dropped_rows"] == 0


def test_is_that_of_all_processes() -> None:
    processes.run(_in_each_process)


def _of_a_stage() -> None:
    layer = "ab"[dist.get_rank()]
    layers = nn.ModuleDict({layer: blocks(swapped=True)[layer]})
    load = ExpertLoad([layers], [], dist.group.WORLD)
    steer(layers[layer], 0)
    if layer == "a":
        layers["a"].expert_bias = None
    run(load, layers)
    found = load.take()
    assert set(found) == {f"expert_load/{name}" for name in ("a", "b", "max_over_mean", "dropped_rows")}
    assert found["expert_load/max_over_mean"] == pytest.approx(EXPERTS / TOP_K)


def test_is_that_of_all_stages_of_a_pipeline() -> None:
    processes.run(_of_a_stage)
