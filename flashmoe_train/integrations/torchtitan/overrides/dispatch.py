"""TorchTitan 0.3.x's token dispatcher on our plan, permutation and combine.

Local dispatch (`ep_mesh` is None) has shapes that do not depend on the routing and never waits for the device. With
expert parallelism TorchTitan's own exchange runs between permutation and combine; that one reads the split sizes on the
host.

Shape suffixes are TorchTitan's: T tokens, D dim, K experts per token, E experts, N = T · K slots, R rows.
"""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.distributed.spmd_types import current_spmd_mesh, maybe_set_sparse_mesh
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.token_dispatcher import (
    AllToAllDispatchMetadata,
    AllToAllTokenDispatcher,
    LocalDispatchMetadata,
)

from flashmoe_train.integrations.torchtitan.overrides.spmd import like, untyped
from flashmoe_train.ops.moe import moe_combine, moe_permute, route_plan


class FlashMoEDispatcher(AllToAllTokenDispatcher):
    """In place of the local and the all-to-all dispatcher, whose `dispatch` calls `_local_reorder` and hands what that
    gives besides rows to `combine`, unread."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def _local_reorder(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows sorted by expert `[N, D]`, and for `combine` which row computes each slot and what it weighs."""
        with untyped():
            plan = route_plan(topk_expert_ids_TK, self.num_experts)
            rows_ND = moe_permute(x_TD, plan.row_slot, plan.slot_row)
        return like(rows_ND, x_TD), plan.slot_row, topk_scores_TK

    def combine(self, routed_output_RD: Tensor, metadata: LocalDispatchMetadata, x_TD: Tensor) -> Tensor:
        """The weighted sum of every token's rows, `[T, D]`."""
        slot_row_TK, scores_TK = metadata.token_indices_experts_sorted_N, metadata.topk_scores_experts_sorted_N
        with untyped():
            rows = routed_output_RD
            if self.ep_mesh is not None:
                assert isinstance(metadata, AllToAllDispatchMetadata)
                rows = self._return_rows(rows, metadata)
            out = moe_combine(rows.contiguous(), slot_row_TK, scores_TK.float())
        return like(out, x_TD)

    def _return_rows(self, rows: Tensor, metadata: AllToAllDispatchMetadata) -> Tensor:
        """The way back of TorchTitan's exchange."""
        with maybe_set_sparse_mesh():
            mesh = current_spmd_mesh() if get_spmd_backend() == "spmd_types" else self.ep_mesh
            group = mesh.get_group("ep")
            rows = self._unpermute(rows, metadata.input_shape, metadata.permuted_indices)
            return self._combine_token_exchange(rows, group, metadata.input_splits, metadata.output_splits)
