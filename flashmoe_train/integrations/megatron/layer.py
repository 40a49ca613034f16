"""Megatron's mixture-of-experts layer around our experts: what is between its router and them.

Shape legend: T tokens, K experts per token, h model dim.
"""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.integrations.megatron import checks
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
from flashmoe_train.integrations.megatron.flex import slots_of


class FlashMoELayer(MoELayer):
    """In place of MoELayer: where a process has all experts, gather and combine are the operator's too. Otherwise
    Megatron's own dispatcher exchanges rows, and the experts compute them; or, if `sharing` says how, the exchange is
    ours, between the same processes.

    Raises UsageError for a configuration in which they cannot share experts by our exchange.
    """

    takes_place_of = "MoELayer"

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: Any = None,
        pg_collection: Any = None,
        *,
        sharing: Sharing | None = None,
        **options: Any,
    ) -> None:
        if pg_collection is None:  # Megatron hands the groups to MoELayer itself, not to classes derived from it
            from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **options)
        self.use_own_dispatcher(pg_collection, sharing)

    def use_own_dispatcher(self, pg_collection: Any, sharing: Sharing | None = None) -> None:
        """Replaces Megatron's dispatcher where tokens go to our experts as they are."""
        if not isinstance(self.experts, FlashMoEExperts):
            return
        config = self.config
        alone = pg_collection.ep.size() == 1 and pg_collection.expt_tp.size() == 1
        if sharing is not None and pg_collection.ep.size() > 1:
            checks.dispatch(config)
            self.experts.sharing = sharing
            self.token_dispatcher = LocalDispatcher(config, pg_collection)
        elif alone and not (config.moe_pad_expert_input_to_capacity or config.moe_shared_expert_overlap):
            self.token_dispatcher = LocalDispatcher(config, pg_collection)

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        if isinstance(self.experts, FlashMoEExperts):
            self.experts.layer = str(layer_number)


class LocalDispatcher(MoETokenDispatcher):
    """Hands tokens and their experts to FlashMoEExperts as they are, whose operators do the rest; nothing is read by
    the host."""

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[..., h]`, which experts each has (bool `[T, experts]`) and their weights `[T, experts]` give tokens
        `[T, h]` and weights `[T, K]`, experts in rising order."""
        self.shape = hidden.shape
        # Fewer than K of a token that an expert has dropped: the operator skips -1.
        self.ids, weights = slots_of(routing_map, probs, self.config.moe_router_topk)
        return hidden.reshape(-1, self.shape[-1]), weights

    def token_dispatch(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, probs

    def dispatch_postprocess(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden, self.ids, probs

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """Where experts could write results and gradients, which versions after 0.16.1 ask: ours return them."""
        return None, None

    def combine_preprocess(self, hidden: Tensor) -> Tensor:
        return hidden

    def token_combine(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return hidden

    def combine_postprocess(self, hidden: Tensor) -> Tensor:
        return hidden.view(self.shape)
