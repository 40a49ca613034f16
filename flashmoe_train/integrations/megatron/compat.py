"""Defects of megatron-core without TransformerEngine, each worked around in one place.

Found in 0.16.1. `apply()` changes what has to be changed before a model is built, and only where the defect is; the
other functions are for a training loop. What cannot be worked around is refused by name.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from flashmoe_train.errors import UsageError


def apply() -> None:
    """Does nothing the second time."""
    if not getattr(apply, "done", False):
        apply.done = True  # type: ignore[attr-defined]
        _bind_te_general_gemm()
        _no_transformer_engine_in_latent_attention()
        _refuse_fsdp2_with_expert_parallelism()
        _load_optimizer_state_by_name()


def _bind_te_general_gemm() -> None:
    # The router asks whether TransformerEngine's product is None, under a name that is bound only if TransformerEngine
    # can be imported: every mixture of experts ends in a NameError (0.14 to 0.16.1).
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _no_transformer_engine_in_latent_attention() -> None:
    # Latent attention takes TransformerEngine to be there if Megatron's wrappers of it can be imported, which they can
    # without it, and asks whether a layer is an instance of what is no class.
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def _refuse_fsdp2_with_expert_parallelism() -> None:
    # TorchFullyShardedDataParallel shards experts, which differ between processes, over all of them: it trains, and
    # computes something else.
    from megatron.core.distributed import torch_fully_sharded_data_parallel as fsdp2

    stock = fsdp2.TorchFullyShardedDataParallel.__init__

    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        if config.expert_model_parallel_size > 1:
            raise UsageError(
                f"TorchFullyShardedDataParallel with expert_model_parallel_size = {config.expert_model_parallel_size}: "
                "Megatron trains that without an error and wrongly; use DistributedDataParallel"
            )
        stock(self, config, *args, **options)

    fsdp2.TorchFullyShardedDataParallel.__init__ = __init__


def _load_optimizer_state_by_name() -> None:
    # The distributed optimizer puts a loaded state back under the assumption that Adam is Apex's: it looks up "step" as
    # a tensor of every parameter, and copies into a leaf that requires a gradient.
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        if not isinstance(self.optimizer, torch.optim.Optimizer) or self.config.use_precision_aware_optimizer:
            stock(self, model_param, tensors)
            return
        group, position = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][position]
        for name, own in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step" and name in tensors:
                own.copy_(tensors[name])

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def before_loading(optimizer: Any) -> None:
    """PyTorch's Adam has no state before its first step, and the distributed optimizer asserts that it has."""
    for own in _distributed(optimizer):
        own._init_optimizer_states_with_dummy_values()


def after_loading(optimizer: Any) -> None:
    """All parameters come back with one tensor for their steps, which each of them would count up: training would go on
    with wrong moments."""
    for own in _distributed(optimizer):
        for state in own.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _distributed(optimizer: Any) -> Iterator[Any]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for own in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(own, DistributedOptimizer):
            yield own


@contextlib.contextmanager
def complete_parameters(model: Any) -> Iterator[None]:
    """Within it the parameters are those of the last step. With overlap_param_gather, DistributedDataParallel gathers
    them in the next forward: a checkpoint between the two would hold old ones."""
    overlaps = getattr(model, "use_forward_hook", False)
    if overlaps:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        if overlaps:
            model.enable_forward_pre_hook()
