"""Our permute and combine in Megatron's slot for fused exchanges, beside its all-to-all dispatcher."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import cpu, flex, install_flex_dispatcher
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts

from ... import processes

EXPERTS, DIM, TOKENS = 4, 16, 10
PARTS = ("out", "gradient of tokens", "gradient of the router", "gradients of experts")


def layer(ours: bool, **options: Any) -> Any:
    """Megatron's own layer, with its experts or ours."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=DIM,
        num_attention_heads=2,
        moe_ffn_hidden_size=24,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        moe_router_dtype="fp32",
        expert_model_parallel_size=dist.get_world_size(),
        **options,
    )
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=FlashMoEExperts if ours else SequentialMLP, submodules=linear)
    return MoELayer(config, MoESubmodules(experts=experts), layer_number=1)


def results(made: Any, tokens: int) -> dict[str, Any]:
    torch.manual_seed(2 + dist.get_rank())
    x = torch.randn(tokens, 1, DIM, requires_grad=True)
    out, _ = made(x)
    (out * torch.randn(out.shape)).sum().backward()
    of_experts = torch.cat([p.grad.flatten() for p in made.experts.parameters() if p.grad is not None])
    return dict(zip(PARTS, (out.detach(), x.grad, made.router.weight.grad, of_experts), strict=True))


def both_dispatchers(root: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from flashmoe_train.integrations.megatron import compat

    cpu.apply()
    compat.apply()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(0)
    install_flex_dispatcher()
    slot = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
    dropped = {"moe_expert_capacity_factor": 0.5, "moe_router_load_balancing_type": "none"}
    for ours in (False, True):
        for tokens in (TOKENS, 1 + 4 * dist.get_rank()):
            for options in ({}, dropped):
                wanted = results(layer(ours, moe_token_dispatcher_type="alltoall", **options), tokens)
                found = results(layer(ours, **slot, **options), tokens)
                for part in PARTS:
                    torch.testing.assert_close(found[part], wanted[part], msg=lambda text, part=part: f"{part}: {text}")
    (root / str(dist.get_rank())).touch()


def test_equals_the_all_to_all_dispatcher(tmp_path: Path) -> None:
    processes.run(both_dispatchers, tmp_path, processes=2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("padding", [{"num_permuted_tokens": 64}, {"pad_multiple": 16}], ids=str)
def test_padded_experts_are_refused(padding: dict[str, int]) -> None:
    arguments = torch.zeros(3, 8), torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4)
    with pytest.raises(UsageError, match="our flex dispatcher does not pad experts"):
        flex.dispatch(*arguments, dist.group.WORLD, 4, **padding)


def test_slots_of_tokens() -> None:
    routing = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    probs = torch.arange(12.0).view(3, 4)
    ids, weights = flex.slots_of(routing, probs, 2)
    assert ids.tolist() == [[1, 3], [-1, -1], [0, -1]]
    assert weights[0].tolist() == [1, 3] and weights[2, 0] == 8
    assert flex.slots_of(routing, probs, 9)[0].shape == (3, 4)
