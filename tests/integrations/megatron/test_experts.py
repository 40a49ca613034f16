"""Swapped experts and mixture-of-experts layers against Megatron's own, one process."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import compat
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
from flashmoe_train.integrations.megatron.layer import FlashMoELayer, LocalDispatcher
from flashmoe_train.ops.moe import WeightGradients, moe_rows

from . import grouped_linear

EXPERTS, DIM, TOKENS = 4, 16, 24

pytestmark = pytest.mark.usefixtures("alone")


def config(**options: Any) -> TransformerConfig:
    sizes = {
        "num_layers": 1,
        "hidden_size": DIM,
        "num_attention_heads": 2,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 24,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }
    return TransformerConfig(**sizes | options)


def linear() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def both(given: TransformerConfig | None = None) -> tuple[SequentialMLP, FlashMoEExperts]:
    given, groups = given or config(), get_default_pg_collection()
    torch.manual_seed(1)
    stock = SequentialMLP(EXPERTS, given, linear(), groups)
    torch.manual_seed(1)
    return stock, FlashMoEExperts(EXPERTS, given, pg_collection=groups)


def layers(**options: Any) -> tuple[MoELayer, FlashMoELayer]:
    compat.apply()
    found = []
    for kind, experts in ((MoELayer, SequentialMLP), (FlashMoELayer, FlashMoEExperts)):
        torch.manual_seed(1)
        parts = MoESubmodules(experts=ModuleSpec(module=experts, submodules=linear()))
        found.append(kind(config(**options), parts, layer_number=1))
    return tuple(found)  # type: ignore[return-value]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.tensor([7, 0, 12, 5])
    return torch.randn(TOKENS, DIM, requires_grad=True), counts, torch.rand(TOKENS, requires_grad=True)


def test_computes_and_begins_as_stock() -> None:
    stock, ours = both()
    x, counts, probs = rows()
    weight = torch.randn(TOKENS, DIM)
    results = []
    for experts in (stock, ours):
        x.grad = probs.grad = None
        y, bias = experts(x, counts, probs)
        assert bias is None
        (y * weight).sum().backward()
        results.append((y.detach(), x.grad, probs.grad))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    for e, expert in enumerate(stock.local_experts):
        gate, up = expert.linear_fc1.weight.chunk(2)
        for own, theirs in ((ours.w1, gate), (ours.w3, up), (ours.w2, expert.linear_fc2.weight)):
            assert torch.equal(own[e], theirs)
        wanted = expert.linear_fc1.weight.grad
        if wanted is not None:
            torch.testing.assert_close(torch.cat([ours.w1.grad[e], ours.w3.grad[e]]), wanted)
            torch.testing.assert_close(ours.w2.grad[e], expert.linear_fc2.weight.grad)
    assert ours.w1.allreduce and ours.w1.tensor_model_parallel == stock.local_experts[0].linear_fc1.weight.allreduce


def test_state_dict_is_stocks() -> None:
    stock, ours = both()
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_()
    ours.load_state_dict(stock.state_dict())
    found = ours.state_dict()
    assert found.keys() == stock.state_dict().keys()
    for name, wanted in stock.state_dict().items():
        assert wanted is None or torch.equal(found[name], wanted)
    stock.load_state_dict(found)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({name: x for name, x in found.items() if "experts.1." not in name})


def shards(experts: Any, apart: bool) -> dict[tuple, Tensor | None]:
    """What it gives to a distributed checkpoint: key, shapes and places of every shard."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    groups = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = experts.sharded_state_dict("mlp.", ((0, 1, 3),), {"singleton_local_shards": apart, "dp_cp_group": groups})
    apply_factories(state)
    flat = [x for value in state.values() for x in (value if isinstance(value, list) else [value])]
    flat = [y for x in flat for y in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else [x])]
    return {
        (x.key, x.global_shape, x.global_offset, x.replica_id): x.data if isinstance(x, ShardedTensor) else None
        for x in flat
        if isinstance(x, ShardedTensor | ShardedObject)
    }


@pytest.mark.parametrize("apart", [False, True])
def test_distributed_checkpoints_have_stocks_shards(apart: bool) -> None:
    stock, ours = (shards(experts, apart) for experts in both())
    assert ours.keys() == stock.keys() and len(ours) == EXPERTS * 5
    assert all(x is None or torch.equal(ours[key], x) for key, x in stock.items())


class Group(NamedTuple):
    """Of processes, as far as checkpoints ask."""

    of_rank: int
    of_size: int

    def rank(self) -> int:
        return self.of_rank

    def size(self) -> int:
        return self.of_size


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "expert, tensor, data", [((0, 1), (0, 1), (0, 1)), ((1, 2), (0, 1), (2, 3)), ((2, 3), (1, 2), (0, 1))]
)
def test_distributed_checkpoints_have_the_shards_of_grouped_experts(
    expert: tuple, tensor: tuple, data: tuple, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TEGroupedMLP's, by its own code, wherever a process is."""
    stock, ours = both()
    groups = SimpleNamespace(ep=Group(*expert), expt_tp=Group(*tensor), expt_dp=Group(*data))
    ours.ep_group, ours.tp_group, ours.dp_group = groups.ep, groups.expt_tp, groups.expt_dp
    weights = [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in stock.local_experts]
    module = grouped_linear.load(monkeypatch)
    grouped = shards(grouped_linear.experts(module, config(), groups, weights), apart)
    found = shards(ours, apart)
    assert found.keys() == grouped.keys() and len(found) == EXPERTS * 5
    assert all(x is None or torch.equal(found[key], x) for key, x in grouped.items())


def test_gradients_of_several_turns_are_summed_in_float32() -> None:
    """As the products have them: neither each gradient nor their sum is ever one of the parameters' dtype."""
    given = config(params_dtype=torch.bfloat16, bf16=True)
    _, ours = both(given)
    wrapped = DistributedDataParallel(given, DistributedDataParallelConfig(grad_reduce_in_fp32=True), ours)
    x, counts, probs = rows()
    offsets = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32)
    weights = ours.w1, ours.w2, ours.w3
    wanted = WeightGradients(*(torch.zeros(w.shape) for w in weights))
    for turn in range(2):
        one = (x.detach() + turn).bfloat16()
        wrapped(one, counts, probs.detach())[0].float().square().sum().backward()
        moe_rows(one, *weights, offsets, probs.detach(), gradients=wanted).float().square().sum().backward()
        assert not torch.equal(ours.w1.main_grad, ours.w1.main_grad.bfloat16().float())
    for weight, whole in zip(weights, wanted.sums, strict=True):
        assert weight.main_grad.dtype == torch.float32 and weight.grad is None
        assert torch.equal(weight.main_grad, whole)


def test_delayed_gradients_wait_for_backward_dw() -> None:
    given, delayed = config(), config()
    delayed.delay_wgrad_compute = True
    x, counts, probs = rows()
    _, now = both(given)
    _, later = both(delayed)
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, delay_wgrad_compute=True)
    wrapped = DistributedDataParallel(delayed, options, later)
    inputs = [x.detach() * factor for factor in (1.0, 2.0)]
    after = []
    for one in inputs:
        now(one, counts, probs.detach())[0].square().sum().backward()
        after.append([p.grad.clone() for p in now.parameters()])
    outs = [wrapped(one.requires_grad_(), counts, probs.detach())[0] for one in inputs]
    for number, out in enumerate(outs):
        out.square().sum().backward()
        assert inputs[number].grad is not None
    assert all(not p.main_grad.any() for p in later.parameters())
    for wanted in after:  # the oldest first
        later.backward_dw()
        torch.testing.assert_close([p.main_grad for p in later.parameters()], wanted)
    later.backward_dw()  # nothing is left
    torch.testing.assert_close([p.main_grad for p in later.parameters()], after[-1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "probs"},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"moe_token_dispatcher_type": "allgather"},
    ],
)
def test_the_whole_layer_computes_as_stock(options: dict[str, Any]) -> None:
    stock, ours = layers(**options)
    padded = options.get("moe_pad_expert_input_to_capacity", False)
    assert isinstance(ours.token_dispatcher, LocalDispatcher) != padded
    x, weight = torch.randn(2, 6, 2, DIM)
    results = []
    for layer in (stock, ours):
        inputs = x.clone().requires_grad_()
        out, _ = layer(inputs)
        (out * weight).sum().backward()
        results.append((out.detach(), inputs.grad, layer.router.weight.grad))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    stock.load_state_dict(ours.state_dict())


def test_tokens_that_lost_an_expert() -> None:
    """A slot that was dropped is nobody's: not one more of the first expert's."""
    _, ours = layers()
    dispatcher = ours.token_dispatcher
    routing_map = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    probs = torch.rand(3, EXPERTS) * routing_map
    tokens, weights = dispatcher.dispatch_preprocess(torch.randn(3, 1, DIM), routing_map, probs)
    assert tokens.shape == (3, DIM) and dispatcher.ids.tolist() == [[0, 3], [0, -1], [-1, -1]]
    assert torch.equal(weights[dispatcher.ids >= 0], probs[routing_map])
    assert dispatcher.get_expert_zero_copy_buffers() == (None, None)  # later versions ask


@pytest.mark.parametrize(
    "options, text",
    [
        ({"gated_linear_unit": False}, "they are SwiGLU"),
        ({"activation_func": F.gelu}, "they are SwiGLU"),
        ({"add_bias_linear": True}, "they have no bias"),
        ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value"),
        ({"expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 2}, "experts drift apart"),
    ],
)
def test_what_they_do_not_compute_is_named(options: dict[str, Any], text: str) -> None:
    given = config()
    for key, value in options.items():
        setattr(given, key, value)
    with pytest.raises(UsageError, match=text):
        FlashMoEExperts(EXPERTS, given, pg_collection=get_default_pg_collection())
