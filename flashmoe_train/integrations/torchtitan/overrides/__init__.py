"""TorchTitan 0.3.x: entries of a configuration are replaced before anything is built.

What `--override.imports` can name, each after `flashmoe_train.integrations.torchtitan.overrides.`:

    flex_attention      attention of a model that uses flex attention
    varlen_attention    the same of one that uses varlen attention
    routed_experts      dispatch, experts and combine
    dispatcher          dispatch and combine alone; the experts stay stock
    checkpointing       selective checkpointing keeps what our operators give

Parameters, their names, shapes and initialisation stay as they are. `routed_experts` brings `dispatcher` with it;
naming both is an error of TorchTitan's, which takes one override for an entry.
"""

from torchtitan.config import derive, override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.overrides import documents
from flashmoe_train.integrations.torchtitan.overrides.attention import FlashMoEAttention
from flashmoe_train.integrations.torchtitan.overrides.checkpointing import FlashMoESelectiveAC
from flashmoe_train.integrations.torchtitan.overrides.dispatch import FlashMoEDispatcher
from flashmoe_train.integrations.torchtitan.overrides.experts import FlashMoEExperts, FlashMoERoutedExperts


@override(target=FlexAttention.Config, exact=True, description="flashmoe attention within documents")
def flex_attention(config: FlexAttention.Config) -> FlashMoEAttention.Config:
    """Flex attention of a model whose masks are causal documents, as those of llama3, qwen3 and deepseek_v3 are."""
    documents.install()
    return derive(config, FlashMoEAttention.Config)


@override(target=VarlenAttention.Config, exact=True, description="flashmoe attention within documents")
def varlen_attention(config: VarlenAttention.Config) -> FlashMoEAttention.Config:
    """Varlen attention, if it is causal."""
    documents.install()
    return derive(config, FlashMoEAttention.Config)


@override(target=RoutedExperts.Config, exact=True, description="flashmoe dispatch, experts and combine")
def routed_experts(config: RoutedExperts.Config) -> FlashMoERoutedExperts.Config:
    """All of a mixture-of-experts block but its router and its shared experts."""
    if type(config.inner_experts) is not GroupedExperts.Config:
        found = type(config.inner_experts).__qualname__
        raise UsageError(f"routed_experts takes the place of GroupedExperts alone, found {found}")
    return derive(
        config,
        FlashMoERoutedExperts.Config,
        inner_experts=derive(config.inner_experts, FlashMoEExperts.Config),
        token_dispatcher=dispatcher(config.token_dispatcher),
    )


@override(target=LocalTokenDispatcher.Config, description="flashmoe permutation and combine")
def dispatcher(config: LocalTokenDispatcher.Config) -> FlashMoEDispatcher.Config:
    """Local and all-to-all dispatch. Raises UsageError for a dispatcher with kernels of its own."""
    if type(config) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        found = type(config).__qualname__
        raise UsageError(f"dispatcher takes the place of TorchTitan's local and all-to-all dispatchers, found {found}")
    return derive(config, FlashMoEDispatcher.Config)


@override(target=SelectiveAC.Config, exact=True, description="keep flashmoe operators' results")
def checkpointing(config: SelectiveAC.Config) -> FlashMoESelectiveAC.Config:
    """Selective activation checkpointing."""
    return derive(config, FlashMoESelectiveAC.Config)
