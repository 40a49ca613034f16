"""TorchTitan's mixture-of-experts block on `flashmoe_train.ops.moe`.

The whole block is swapped, not its experts alone: stock gathers tokens before `experts` and scatters after it, so only
the block can leave both to the operator. Router, shared experts and all parameters stay where they are. Calls still go
through the `experts` module, because FSDP gathers its weights in that module's hooks.

Shape legend: B batch, S sequence, D dim, T = B · S tokens, K experts per token, E experts, R rows.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.moe.moe import GroupedExperts, MoE

from flashmoe_train.ops.library import compute_dtype
from flashmoe_train.ops.moe import moe, moe_combine, moe_permute, moe_rows
from flashmoe_train.ops.moe.rows import inverse
from flashmoe_train.swap import Swap


class FlashMoEExperts(GroupedExperts):
    """The weights of the experts; called with tokens, or with rows that an exchange has delivered."""

    def forward(self, x: Tensor, routing: Tensor, weights: Tensor | None = None) -> Tensor:
        """Tokens x `[T, D]`, the experts `routing` `[T, K]` of each and their `weights` `[T, K]` give `[T, D]`.

        Without weights x holds rows `[R, D]` sorted by expert and `routing` how many each expert has, `[E]`: stock's
        signature, which the hooks of TorchTitan's expert and tensor parallelism on this module expect.
        """
        dtype = compute_dtype(x)
        w1, w2, w3 = (_local(w).to(dtype) for w in (self.w1, self.w2, self.w3))
        if weights is not None:
            return moe(x.to(dtype), w1, w2, w3, routing, weights).type_as(x)
        ends = routing.cumsum(0, dtype=torch.int32)
        offsets = torch.cat([ends.new_zeros(1), ends])
        return moe_rows(x.to(dtype), w1, w2, w3, offsets).type_as(x)


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


def _local(w: Tensor) -> Tensor:
    return w.to_local() if isinstance(w, DTensor) else w


def swaps(model: nn.Module) -> list[Swap]:
    """Every MoE block with the experts in it."""
    return [Swap(MoE, FlashMoEBlock), Swap(GroupedExperts, FlashMoEExperts)]


OPERATORS = [torch.ops.flashmoe.route_plan.default, torch.ops.flashmoe.moe_forward.default]
