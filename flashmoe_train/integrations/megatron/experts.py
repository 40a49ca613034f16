"""Megatron's experts on `flashmoe_train.ops.moe` and `flashmoe_train.ops.expert_parallel`.

Weights are three tensors for all experts of a process, as the operator wants them. In state dicts and distributed
checkpoints they have the names and shapes of Megatron's SequentialMLP, so that either loads what the other has saved.

Shape legend: T tokens, K experts per token, E experts of this process, R rows, h model dim, n hidden dim of an expert
on this process.
"""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.integrations.megatron import checks
from flashmoe_train.ops import expert_parallel
from flashmoe_train.ops.moe import WeightGradients, moe, moe_rows

# Of an expert in SequentialMLP: which parameter holds ours, and which half of its rows.
_HOME = {"w1": ("linear_fc1", 0), "w3": ("linear_fc1", 1), "w2": ("linear_fc2", 0)}


class FlashMoEExperts(MegatronModule):
    """In place of SequentialMLP, GroupedMLP or TEGroupedMLP, in `experts` of a layer's specification.

    Parameters w1, w3 `[E, n, h]` and w2 `[E, h, n]`, initialised as SequentialMLP's. They are marked as Megatron marks
    experts, so that its data parallelism sums their gradients over the right processes. Where it has given them a
    `main_grad`, the operator adds to that, in its dtype; gradients in the parameters' dtype are then never made. With
    `delay_wgrad_compute` that waits for `backward_dw`.

    Raises UsageError for a configuration that it does not compute.
    """

    takes_place_of = "SequentialMLP"
    sharing: Sharing | None = None  # how tokens reach the experts of other processes, where these take tokens
    layer = "experts"  # whose they are, in what is said of that

    def __init__(
        self, num_local_experts: int, config: Any, submodules: Any = None, pg_collection: Any = None, name: Any = None
    ) -> None:
        checks.experts(config)
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self._build(num_local_experts)
        self._delayed: deque[WeightGradients] = deque()
        self._wgrad_hooks: list[Callable[[], None]] = []
        if config.delay_wgrad_compute:
            for parameter in self.parameters():
                parameter.skip_backward_post_hook = True
        self.register_state_dict_post_hook(_as_sequential)
        self.register_load_state_dict_pre_hook(_from_sequential)

    def _build(self, experts: int) -> None:
        """Every expert as stock makes it, one after the other: the same random numbers, the same marks."""
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        size = self.config.moe_ffn_hidden_size
        for expert in range(experts):
            # RowParallelLinear takes its width from the configuration, not from the argument.
            config = _with_width(self.config, size)
            stock = MLP(config, linear, ffn_hidden_size=size, is_expert=True, tp_group=self.tp_group)
            gate, up = stock.linear_fc1.weight.detach().chunk(2)
            for name, weight in (("w1", gate), ("w3", up), ("w2", stock.linear_fc2.weight.detach())):
                if expert == 0:
                    parameter = torch.nn.Parameter(weight.new_empty(experts, *weight.shape))
                    vars(parameter).update(vars(getattr(stock, _HOME[name][0]).weight))
                    self.register_parameter(name, parameter)
                getattr(self, name).data[expert].copy_(weight)

    def forward(self, x: Tensor, routing: Tensor, probs: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Rows x `[R, h]` sorted by expert, how many each expert has `[E]` and a weight for each `[R]`, as Megatron's
        dispatchers hand them over, give `[R, h]`. Or, from our own dispatcher: tokens x `[T, h]`, the experts of each
        `[T, K]` (of all processes if they share; -1: none) and their weights `[T, K]` give tokens `[T, h]`."""
        gradients = self._gradients() if torch.is_grad_enabled() else None
        w1, w2, w3 = self._weights()
        if gradients is not None:
            apart = gradients.delayed
            w1, w2, w3 = (w.detach().requires_grad_() for w in (w1, w2, w3)) if apart else _Added.apply(w1, w2, w3)
        if routing.dim() == 2:
            return self._of_tokens(x, w1, w2, w3, routing, probs.float(), gradients), None
        ends = routing.to(x.device).cumsum(0, dtype=torch.int32)
        offsets = torch.cat([ends.new_zeros(1), ends])
        return moe_rows(x.contiguous(), w1, w2, w3, offsets, probs.float(), gradients=gradients), None

    def _of_tokens(
        self,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        ids: Tensor,
        weights: Tensor,
        gradients: WeightGradients | None,
    ) -> Tensor:
        if self.sharing is None:
            return moe(x, w1, w2, w3, ids, weights, score_mode="activation", gradients=gradients)
        (tokens, dim), group = x.shape, self.ep_group
        experts = self.num_local_experts * group.size()
        exchange = self.sharing.exchange(group, experts, dim, ids.shape[1], x.dtype, x.device, tokens)
        if tokens > exchange.tokens:
            raise UsageError(
                f"layer {self.layer} has {tokens} tokens at once, and our exchange was made for {exchange.tokens}: "
                "set swap's dispatch_tokens to the most that come"
            )
        return expert_parallel.routed_experts(
            x, w1, w2, w3, ids, weights, exchange, self.layer, score_mode="activation", gradients=gradients
        )

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1, self.w2, self.w3

    def _gradients(self) -> WeightGradients | None:
        """Where those of a forward go, if not to autograd."""
        weights, delayed = self._weights(), self.config.delay_wgrad_compute
        sums: list[Any] = [getattr(weight, "main_grad", None) for weight in weights]
        if any(dw is None for dw in sums):
            if not delayed:
                return None
            sums = [torch.zeros_like(weight) for weight in weights]
        found = WeightGradients(*sums, delayed=delayed)
        if delayed:
            self._delayed.append(found)
        return found

    def backward_dw(self) -> None:
        """Adds the weights' gradients of the oldest forward, if they are delayed."""
        if not self._delayed:
            return
        gradients = self._delayed.popleft()
        if not len(gradients):
            return  # its backward has not run
        gradients.add()
        for weight, dw in zip(self._weights(), gradients.sums, strict=True):
            if dw is getattr(weight, "main_grad", None):
                weight.grad = _is_added(weight)
            else:
                weight.grad = dw if weight.grad is None else weight.grad + dw
        for hook in self._wgrad_hooks:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Data parallelism gives its hook for each parameter here if gradients are delayed."""
        self._wgrad_hooks.append(hook)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Shards of SequentialMLP's `experts.linear_fc1.weight` and `linear_fc2.weight`, an axis for the experts."""
        apart = bool((metadata or {}).get("singleton_local_shards", False))
        replica = (0, 0, self.dp_group.rank())
        weights: dict[str, Any] = {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}experts.{home}.weight",
                parameter,
                _Shards(name, self, sharded_offsets, apart),
                _merge,
                replica,
            )
            for name, (home, _) in _HOME.items()
            for parameter in [getattr(self, name)]
        }
        of_linear = (0, self.tp_group.rank(), self.dp_group.rank())
        return weights | self._extra_states(prefix, sharded_offsets, apart, of_linear)

    def _extra_states(self, prefix: str, offsets: tuple, apart: bool, replica: tuple) -> dict[str, Any]:
        """Nothing, of every linear layer that stock's experts have: it keeps a place for TransformerEngine's there."""
        first, whole = self.ep_group.rank() * self.num_local_experts, self.ep_group.size() * self.num_local_experts
        found = {}
        for e in range(self.num_local_experts):
            inside = f"experts.{first + e}" if apart else "experts"
            outer = offsets if apart else (*offsets, (len(offsets), first + e, whole))
            for linear in ("linear_fc1", "linear_fc2"):
                name = f"{linear}._extra_state"
                found[f"{prefix}local_experts.{e}.{name}"] = make_sharded_object_for_checkpoint(
                    None, f"{prefix}{inside}.{name}", outer, replica_id=replica
                )
        return found


def _is_added(weight: Any) -> Tensor:
    """Tells Megatron's data parallelism that `main_grad` has the gradient; it wants to see one that it may drop."""
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class _Added(torch.autograd.Function):
    """Weights whose gradients are in their `main_grad` by the time that autograd comes here."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: None) -> tuple[Tensor, ...]:
        return tuple(map(_is_added, ctx.weights))


class _Shards:
    """Cuts a tensor of w1's, w2's or w3's shape, the weights themselves or a moment of the optimizer, into the shards
    that SequentialMLP would have."""

    def __init__(self, name: str, experts: FlashMoEExperts, offsets: tuple, apart: bool) -> None:
        self.name, self.offsets, self.apart = name, offsets, apart
        self.first = experts.ep_group.rank() * experts.num_local_experts
        self.experts = experts.ep_group.size() * experts.num_local_experts
        self.rank, self.size = experts.tp_group.rank(), experts.tp_group.size()

    @torch.no_grad()
    def __call__(self, key: str, whole: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise NotImplementedError("swapped experts need distrib_optim_sharding_type='fully_reshardable'")
        _, half = _HOME[self.name]
        found = []
        for i, weight in enumerate(whole):
            outer, name = (*self.offsets, (len(self.offsets), self.first + i, self.experts)), key
            if self.apart:
                outer, name = self.offsets, key.replace("experts.linear", f"experts.{self.first + i}.linear")
            if self.name == "w2":
                inner = (len(outer) + 1, self.rank, self.size)
            elif self.apart:
                inner, name = (len(outer), self.rank, self.size), f"{name}_{'wv'[half]}"
            else:  # stock has gate and up in one tensor: all processes' gates, then all their ups
                inner = (len(outer), self.rank + half * self.size, 2 * self.size)
            found.append(
                ShardedTensor.from_rank_offsets(
                    name, weight, *outer, inner, replica_id=replica_id, prepend_axis_num=len(outer)
                )
            )
        return found


@torch.no_grad()
def _merge(shards: list[Tensor]) -> Tensor:
    return torch.stack(shards)


def _with_width(config: Any, width: int) -> Any:
    if config.ffn_hidden_size == width:
        return config
    config = copy.copy(config)
    config.ffn_hidden_size = width
    return config


def _as_sequential(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    w1, w2, w3 = (state.pop(f"{prefix}{name}") for name in ("w1", "w2", "w3"))
    for e in range(module.num_local_experts):
        state[f"{prefix}local_experts.{e}.linear_fc1.weight"] = torch.cat([w1[e], w3[e]])
        state[f"{prefix}local_experts.{e}.linear_fc2.weight"] = w2[e]
        for linear in ("linear_fc1", "linear_fc2"):
            state[f"{prefix}local_experts.{e}.{linear}._extra_state"] = None


def _from_sequential(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    names = [f"{prefix}local_experts.{e}" for e in range(module.num_local_experts)]
    for name in [f"{name}.linear_fc{i}._extra_state" for name in names for i in (1, 2)]:
        state.pop(name, None)
    if not all(f"{name}.linear_fc{i}.weight" in state for name in names for i in (1, 2)):
        return  # our own names, from a distributed checkpoint; or an error that load_state_dict names
    both = torch.stack([state.pop(f"{name}.linear_fc1.weight") for name in names])
    state[f"{prefix}w1"], state[f"{prefix}w3"] = both.chunk(2, 1)
    state[f"{prefix}w2"] = torch.stack([state.pop(f"{name}.linear_fc2.weight") for name in names])
