"""Ways to exchange tokens between the processes that hold the experts, as the bench `expert_parallel` times them.

T tokens a process, d model dim, E experts over W processes, K experts a token. `dispatch` brings every token to the
experts of its ids, sorted by expert; `combine` brings the experts' rows back and sums them with the router weights.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from flashmoe_train.bench.measure import Unavailable
from flashmoe_train.bench.moe import scattered, sorted_slots
from flashmoe_train.bench.peers import import_peer
from flashmoe_train.ops.expert_parallel import Exchange, ep_plan
from flashmoe_train.ops.expert_parallel.collective import Arrived
from flashmoe_train.ops.moe import moe_combine, moe_permute, route_plan


class Dispatched(NamedTuple):
    rows: Tensor  # [rows of this process' experts, d], sorted by expert
    counts: Tensor  # [experts here]: rows of each
    handle: Any  # what combine needs to know


class AllToAll:
    """As TorchTitan does it: permute, exchange the counts, wait for them on the host, exchange a row per slot, sort by
    expert; and all of that back. Differentiable."""

    def __init__(self, experts: int) -> None:
        self.experts, self.world = experts, dist.get_world_size()
        self.group = dist.distributed_c10d._get_default_group()

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Dispatched:
        order, ends = sorted_slots(ids, self.experts)
        counts = ends.diff(prepend=ends.new_zeros(1)).long()
        arriving = torch.empty_like(counts)  # [W, experts here]
        dist.all_to_all_single(arriving, counts)
        splits_out, splits_in = (c.view(self.world, -1).sum(1).tolist() for c in (counts, arriving))
        token = order // ids.shape[1]
        rows = all_to_all_single_autograd(x[token], splits_in, splits_out, self.group)
        here = self.experts // self.world
        expert = torch.arange(here, device=x.device).repeat(self.world)
        by_expert = expert.repeat_interleave(arriving, output_size=rows.shape[0]).argsort(stable=True)
        handle = (by_expert, splits_in, splits_out, order, token, weights)
        return Dispatched(rows[by_expert], arriving.view(self.world, here).sum(0), handle)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        by_expert, splits_in, splits_out, order, token, weights = dispatched.handle
        by_source = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(len(by_expert), device=y.device))
        rows = all_to_all_single_autograd(y[by_source], splits_out, splits_in, self.group)
        return scattered(rows, weights.reshape(-1)[order], token, len(weights))


class Ours:
    """The exchange of `routed_experts`. Like DeepEP's it brings tokens, not rows: its dispatch ends with the plan by
    which the experts' operator reads them, its combine begins with the weighted sum of a token's rows."""

    def __init__(self, experts: int, tokens: int, dim: int, top_k: int, x: Tensor) -> None:
        self.exchange = Exchange(
            dist.distributed_c10d._get_default_group(),
            experts=experts,
            tokens=tokens,
            dim=dim,
            top_k=top_k,
            dtype=x.dtype,
            device=x.device,
            capacity=dist.get_world_size(),
        )

    def transport(self, x: Tensor, ids: Tensor, weights: Tensor, position: Tensor, counts: Tensor) -> Arrived:
        arrived = self.exchange.transport.dispatch(x, position, counts, 0, ids, weights)
        self.exchange.transport.release()
        return arrived

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Dispatched:
        position, counts = ep_plan(ids, self.exchange.experts, self.exchange.world)
        arrived = self.transport(x, ids, weights, position, counts)
        assert arrived.ids is not None
        plan = route_plan(arrived.ids, self.exchange.here)
        return Dispatched(arrived.rows, arrived.counts, (arrived.weights, plan, position, counts))

    def rows(self, dispatched: Dispatched) -> Tensor:
        """Arrived tokens sorted by expert, as identity experts would return them."""
        plan = dispatched.handle[1]
        return moe_permute(dispatched.rows, plan.row_slot, plan.slot_row)

    def summed(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        weights, plan, _, _ = dispatched.handle
        return moe_combine(y, plan.slot_row, weights)

    def transport_back(self, sums: Tensor, dispatched: Dispatched) -> Tensor:
        _, _, position, counts = dispatched.handle
        return self.exchange.transport.combine(sums, position, counts, dispatched.counts, 0)[0]

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        return self.transport_back(self.summed(y, dispatched), dispatched)

    def tokens(self, dispatched: Dispatched) -> Tensor:
        """Those that have arrived, without the places between."""
        places = dispatched.rows.unflatten(0, (self.exchange.world, -1))
        return torch.cat([own[:count] for own, count in zip(places, dispatched.counts.tolist(), strict=True)])


class DeepEP:
    """DeepEP's buffers inside one node: a token goes once to every process that needs it. Less than an exchange: rows
    arrive unsorted, and a token's rows have to be weighted and summed before `combine`."""

    def __init__(self, experts: int, dim: int) -> None:
        deep_ep = import_peer("deep_ep")
        world = dist.get_world_size()
        self.experts = experts
        self.configs = deep_ep.Buffer.get_dispatch_config(world), deep_ep.Buffer.get_combine_config(world)
        size = max(config.get_nvl_buffer_size_hint(2 * dim, world) for config in self.configs)
        self.buffer = deep_ep.Buffer(dist.group.WORLD, num_nvl_bytes=size, num_rdma_bytes=0)
        self.ids_dtype = deep_ep.topk_idx_t

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Dispatched:
        ids = ids.to(self.ids_dtype)
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids, self.experts)
        rows, arrived_ids, arrived_weights, counts, handle, _ = self.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            config=self.configs[0],
        )
        # One row per token: expert by expert is the experts' business here.
        return Dispatched(rows, torch.as_tensor(counts), (arrived_ids, arrived_weights, handle))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        return self.buffer.combine(y, dispatched.handle[2], config=self.configs[1])[0]

    def weighted(self, dispatched: Dispatched) -> Tensor:
        """What identity experts would hand to `combine`: a token's row times its weights on this process."""
        ids, weights, _ = dispatched.handle
        return (dispatched.rows * (weights * (ids >= 0)).sum(1, keepdim=True)).to(dispatched.rows.dtype)


class PeerCopy:
    """A floor: as many bytes as a deduplicated exchange needs, pushed into the others' memory by plain copies."""

    def __init__(self, rows: int, x: Tensor) -> None:
        """`rows` of x `[T, d]` leave this process, as many to each of the others."""
        if x.device.type != "cuda":
            raise Unavailable("GPUs only")
        from torch.distributed import _symmetric_memory as symmetric_memory

        world, rank = dist.get_world_size(), dist.get_rank()
        part = math.ceil(rows / (world - 1))
        tokens, dim = x.shape  # room for all of them from everybody: the same size on every process
        buffer = symmetric_memory.empty(world * tokens, dim, dtype=x.dtype, device=x.device)
        self.memory = symmetric_memory.rendezvous(buffer, dist.distributed_c10d._get_default_group())
        self.peers = [
            self.memory.get_buffer(peer, (part, dim), x.dtype, rank * tokens * dim)
            for peer in sorted(set(range(world)) - {rank}, key=lambda peer: (peer - rank) % world)
        ]
        self.source = x[:part].clone()

    def __call__(self) -> None:
        self.memory.barrier()
        for peer in self.peers:
            peer.copy_(self.source)
        self.memory.barrier()
