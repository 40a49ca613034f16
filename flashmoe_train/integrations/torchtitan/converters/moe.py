"""TorchTitan's mixture-of-experts block on `flashmoe_train.ops.moe`.

The whole block is swapped, not its experts alone: stock gathers tokens before `experts` and scatters after it, so only
the block can leave both to the operator. Router, shared experts and all parameters stay where they are. Calls still go
through the `experts` module, because FSDP gathers its weights in that module's hooks.

Shape legend: B batch, S sequence, D dim, T = B · S tokens, K experts per token, E experts, R rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.moe.moe import GroupedExperts, MoE, TokenReorderer

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.integrations.torchtitan.core import experts_over_ranks, routed_experts
from flashmoe_train.ops.moe import moe_combine, moe_permute
from flashmoe_train.ops.moe.rows import inverse
from flashmoe_train.swap import Swap


class FlashMoEExperts(GroupedExperts):
    """The weights of the experts; called with tokens, or with rows that an exchange has delivered."""

    def forward(self, x: Tensor, routing: Tensor, weights: Tensor | None = None) -> Tensor:
        return routed_experts(x, self.w1, self.w2, self.w3, routing, weights)


class FlashMoEBlock(MoE):
    """TorchTitan's MoE block with our gather, experts and combine."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        x = x.view(-1, dim)
        weights, ids, counts = self.router(x, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        if self.score_before_experts or isinstance(self.experts.w1, DTensor):
            routed = self._routed_by_rows(x, weights, ids)
        else:
            routed = self.experts(x, ids, weights)
        if self.shared_experts is not None:
            routed = self.shared_experts(x) + routed
        return routed.reshape(batch, length, dim)

    def _routed_by_rows(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Permute, experts, combine as three steps, for what happens to the rows in between: TorchTitan's tensor and
        expert parallelism hook into `experts` (whose weights are then DTensors) and into `reorderer`, which may keep
        only this process' share of the slots; and llama4 multiplies its scores before the experts."""
        row_weights, row_slot, counts = self.reorderer(weights, ids)
        slot_row = inverse(row_slot, ids.numel()).view(ids.shape)
        rows = moe_permute(x, row_slot.int(), slot_row)
        if self.score_before_experts:
            rows = (rows.float() * row_weights[:, None]).to(x.dtype)
        rows = self.experts(rows, counts)
        return moe_combine(rows.contiguous(), slot_row, None if self.score_before_experts else weights.float())


class FlashMoEReorderer(TokenReorderer):
    """Not called by a block that exchanges tokens itself; knows which part of them is this process' to send, where
    tensor parallelism gives all of a group the same."""

    share = (0, 1)  # which part, of how many


class Uncast:
    """A tensor that FSDP does not see: with mixed precision it rounds the floating-point tensors that a module it wraps
    is called with, and router weights are float32."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class FlashMoESharedExperts(FlashMoEExperts):
    """The weights of this process' experts, called with tokens of its own and the experts of all processes."""

    shared: Sharing
    layer: str  # its name

    def forward(self, x: Tensor, ids: Tensor, weights: Uncast) -> Tensor:  # type: ignore[override]
        return experts_over_ranks(x, self.w1, self.w2, self.w3, ids, weights.tensor, self.shared, self.layer)


class FlashMoESharedBlock(FlashMoEBlock):
    """With our exchange between the processes that share the experts."""

    def _routed_by_rows(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        part, parts = self.reorderer.share
        if parts == 1:
            return self._routed(x, weights, ids)
        if x.shape[0] % parts:
            raise UsageError(
                f"tensor_parallel_degree {parts} does not divide the {x.shape[0]} tokens of a batch: our dispatch has"
                " each process send its part"
            )
        count = x.shape[0] // parts
        own = slice(part * count, (part + 1) * count)
        # The others' parts come from them: blocks under tensor parallelism give what has to be summed.
        return F.pad(self._routed(x[own], weights[own], ids[own]), (0, 0, own.start, x.shape[0] - own.stop))

    def _routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.experts(x, ids.contiguous(), Uncast(weights.float().contiguous()))


def swaps(model: nn.Module) -> list[Swap]:
    """Every MoE block with the experts in it."""
    return [Swap(MoE, FlashMoEBlock), Swap(GroupedExperts, FlashMoEExperts)]


def swaps_over_ranks(model: nn.Module) -> list[Swap]:
    """The same under expert parallelism, with our exchange."""
    return [
        Swap(MoE, FlashMoESharedBlock),
        Swap(GroupedExperts, FlashMoESharedExperts),
        Swap(TokenReorderer, FlashMoEReorderer),
    ]
