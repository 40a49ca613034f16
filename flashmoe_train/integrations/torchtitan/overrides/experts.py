"""TorchTitan 0.3.x's routed experts on `flashmoe_train.ops.moe`.

Its RoutedExperts dispatches tokens to rows, computes the experts on them and combines them. Where no rows are exchanged
between processes the three are one operator here; with expert parallelism they stay three, around TorchTitan's own
exchange (`dispatch`).

Shape suffixes are TorchTitan's: B batch, L sequence, T = B · L tokens, D dim, K experts per token, E experts, R rows.
"""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

from flashmoe_train.integrations.torchtitan.core import routed_experts
from flashmoe_train.integrations.torchtitan.overrides.spmd import product, untyped


class FlashMoEExperts(GroupedExperts):
    """The weights of the experts; called with tokens, or with rows that an exchange has delivered."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x: Tensor, routing: Tensor, weights: Tensor | None = None) -> Tensor:
        with untyped():
            out = routed_experts(x, self.w1_EFD, self.w2_EDF, self.w3_EFD, routing, weights)
        return product(out, x, self.w1_EFD)  # tensor parallelism cuts the hidden dim


class FlashMoERoutedExperts(RoutedExperts):
    """Dispatch, experts and combine."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        if getattr(self.token_dispatcher, "ep_mesh", None) is not None:
            return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)
        scores_TK, ids_TK = (x.flatten(0, 1) for x in (topk_scores_BLK, topk_expert_ids_BLK))
        return self.inner_experts(x_BLD.flatten(0, 1), ids_TK, scores_TK.float()).view(x_BLD.shape)
