"""Context parallelism in TorchTitan 0.2.x: each process has a part of every sequence; its queries see the keys of all.

TorchTitan cuts a sequence into twice as many chunks as there are processes and gives each one from either end, so that
all have the same work. Keys and values are gathered and put in order; a chunk of queries attends, causally, to the keys
up to its end. The gradient of the gather is a reduce-scatter.

Shape legend: B batch, W processes, L tokens of a chunk, S = 2 L of a process, T = 2 W L of a sequence, H heads, D dim.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module

from flashmoe_train.errors import UsageError
from flashmoe_train.ops.attention import attention


@dataclass(frozen=True)
class Context:
    """The processes that share a sequence."""

    mesh: DeviceMesh

    @property
    def chunks(self) -> tuple[int, int]:
        """Of this process, in the order in which it has them; counted from the sequence's beginning."""
        rank, world = self.mesh.get_local_rank(), self.mesh.size()
        return rank, 2 * world - 1 - rank

    def attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
        """`attention` of `[B, S, H, D]` over the whole sequence."""
        keys, values = self._gathered(k), self._gathered(v)
        found = []
        for chunk, queries in zip(self.chunks, q.chunk(2, 1), strict=True):
            end = (chunk + 1) * queries.shape[1] if causal else keys.shape[1]
            found.append(attention(queries, keys[:, :end], values[:, :end], causal=causal, softmax_scale=scale))
        return torch.cat(found, 1)

    def _gathered(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` of all processes as `[B, T, H, D]`, in the order of the sequence."""
        shard = DTensor.from_local(x.contiguous(), self.mesh, [Shard(0)], run_check=False)
        everyone = shard.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        chunks = everyone.unflatten(0, (self.mesh.size(), -1)).unflatten(2, (2, -1))  # [W, B, 2, L, H, D]
        in_order = torch.cat([chunks[:, :, 0], chunks[:, :, 1].flip(0)])
        return in_order.transpose(0, 1).flatten(1, 2)


def check(job_config: Any, parallel_dims: Any) -> None:
    """Raises UsageError where context parallelism with swapped attention cannot run."""
    if parallel_dims.tp_enabled and job_config.model.name == "qwen3":
        raise UsageError(
            "context_parallel_degree > 1 and tensor_parallel_degree > 1 together are not supported with qwen3's"
            " attention swapped; set one of them to 1"
        )
    if parallel_dims.pp_enabled:
        raise UsageError(
            "context_parallel_degree > 1 and pipeline_parallel_degree > 1 together are not tested with swapped"
            " attention; set one of them to 1"
        )
    balancer = job_config.parallelism.context_parallel_load_balancer
    if balancer != "headtail":
        raise UsageError(
            f'context_parallel_load_balancer: swapped attention knows "headtail" alone, found {balancer!r}'
        )
    pieces = 2 * parallel_dims.cp
    if job_config.training.seq_len % pieces:
        raise UsageError(
            f"context_parallel_degree {parallel_dims.cp} cuts a sequence into {pieces}, which does not divide seq_len ="
            f" {job_config.training.seq_len}"
        )


def prepare(job_config: Any, modules: tuple[type[nn.Module], ...]) -> None:
    """Has TorchTitan give `modules`, ours, their `context` instead of hooks around them. Others get the hooks."""
    parallelize: Any = importlib.import_module(f"torchtitan.models.{job_config.model.name}.infra.parallelize")

    def apply(attention_modules: Sequence[nn.Module], cp_mesh: DeviceMesh, attention_type: str) -> None:
        for module in attention_modules:
            if isinstance(module, modules):
                module.context = Context(cp_mesh)  # type: ignore[assignment]
            else:
                apply_cp_to_attention_module([module], cp_mesh, attention_type)

    parallelize.apply_cp_to_attention_module = apply
