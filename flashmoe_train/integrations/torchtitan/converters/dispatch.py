"""Our exchange in TorchTitan 0.2.x: what a job gives it, and TorchTitan's plans for sharing experts without its own.

TorchTitan's plan for `experts` shards the weights and exchanges rows in hooks around the module; that for `reorderer`
cuts the slots. Ours shard the same weights, and leave tokens to the block. They are plans by which any model is
parallelised: modules that are not ours get TorchTitan's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.expert_parallel import ExpertParallel, ReordererSequenceParallel
from torchtitan.models.llama4.infra import parallelize
from torchtitan.tools.logging import logger

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import Sharing, forget
from flashmoe_train.integrations.torchtitan.config import FlashMoE
from flashmoe_train.integrations.torchtitan.converters import compat
from flashmoe_train.integrations.torchtitan.converters.moe import FlashMoEReorderer, FlashMoESharedExperts
from flashmoe_train.integrations.torchtitan.sharing import Overflows
from flashmoe_train.ops.expert_parallel import ExchangeCase, supports
from flashmoe_train.ops.library import capability


class SharedExperts(ExpertParallel):
    """Shards the weights; tokens pass."""

    def _token_dispatch(self, mod: nn.Module, inputs: tuple, device_mesh: DeviceMesh) -> Any:
        return inputs if isinstance(mod, FlashMoESharedExperts) else super()._token_dispatch(mod, inputs, device_mesh)

    def _token_combine(self, mod: nn.Module, routed_output: Tensor, device_mesh: DeviceMesh) -> Tensor:
        if isinstance(mod, FlashMoESharedExperts):
            return routed_output
        return super()._token_combine(mod, routed_output, device_mesh)


class SharedTokens(ReordererSequenceParallel):
    """Says whose tokens are whose."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FlashMoEReorderer):
            return super()._apply(module, device_mesh)
        module.share = (device_mesh.get_local_rank(), device_mesh.size())
        return module


def fully_shard(module: Any, **how: Any) -> Any:
    """FSDP2, but not for weights of experts that no other process has: over a mesh of one it rounds and copies them
    for every use, and copies their gradients. Our operator takes them as they are. The module is wrapped all the same,
    so that the wrappers around it leave its weights alone, and that it rounds what it is called with.

    Weights that rest in the host's memory stay FSDP's.
    """
    if isinstance(module, FlashMoESharedExperts) and how["mesh"].size() == 1 and "offload_policy" not in how:
        how["ignored_params"] = set(module.parameters())
    return fsdp.fully_shard(module, **how)


_overflows: Overflows | None = None


def check(job_config: Any, parallel_dims: Any, model_args: Any) -> None:
    """Raises UsageError where expert parallelism with our exchange cannot run."""
    parallelism = job_config.parallelism
    if parallel_dims.etp_enabled:
        raise UsageError(
            'expert_tensor_parallel_degree > 1 is not supported with [flashmoe] dispatch = "flashmoe"; set it to 1, or'
            ' dispatch to "stock"'
        )
    if parallel_dims.pp_enabled and parallelism.pipeline_parallel_schedule.lower() == "dualpipev":
        raise UsageError(
            'pipeline_parallel_schedule "DualPipeV" hooks into TorchTitan\'s exchange; choose another one, or'
            ' dispatch = "stock"'
        )
    if parallelism.expert_parallel_comm_backend == "deepep":
        raise UsageError('expert_parallel_comm_backend "deepep" contradicts [flashmoe] dispatch = "flashmoe"')
    if job_config.optimizer.early_step_in_backward:
        raise UsageError('early_step_in_backward cannot skip steps, as [flashmoe] dispatch = "flashmoe" has to')
    moe = compat.experts_of(model_args)
    if moe.score_before_experts:
        raise UsageError(f'[flashmoe] dispatch = "flashmoe" weighs what experts return: {job_config.model.name} weighs'
                         ' what they are given')  # fmt: skip
    sizes = compat.sizes(model_args)
    assert sizes.experts is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, compat.precision(job_config, parallel_dims))
    dims = (sizes.dim, sizes.experts.hidden_dim, sizes.experts.number, parallel_dims.ep)
    if (reason := supports(ExchangeCase(device, capability(device), dtype, *dims))) is not None:
        raise UsageError(f'[flashmoe] dispatch = "flashmoe": {reason}; "stock" runs')


def prepare(model: nn.Module, job_config: Any, parallel_dims: Any, choices: FlashMoE) -> None:
    """What swapped modules need to know, before the model is parallelised; and that lost rows skip a step."""
    global _overflows
    parallelize.ExpertParallel = SharedExperts
    parallelize.ReordererSequenceParallel = SharedTokens
    parallelize.fully_shard = fully_shard
    forget()  # of an earlier job of this process
    if _overflows is not None:
        _overflows.close()
    _overflows = Overflows(
        OptimizersContainer,
        choices.dispatch_capacity,
        "[flashmoe] dispatch_capacity ([swap] in a recipe)",
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        logger.warning,
    )
    shared = Sharing(
        _tokens(job_config, parallel_dims), choices.dispatch_capacity, job_config.comm.init_timeout_seconds
    )
    for name, module in model.named_modules():
        if isinstance(module, FlashMoESharedExperts):
            module.shared, module.layer = shared, name


def overflows() -> Overflows | None:
    """Of the job with our exchange, if this process has one."""
    return _overflows


def release() -> None:
    """Of a job without our exchange: nothing of an earlier one of this process remains."""
    global _overflows
    forget()
    if _overflows is not None:
        _overflows.close()
        _overflows = None


def _tokens(job_config: Any, parallel_dims: Any) -> int:
    """The most that a process sends at once, in training or validation."""
    training, validation = job_config.training, job_config.validation
    batch, pieces = training.local_batch_size, 1
    if parallel_dims.pp_enabled:
        pieces = batch // job_config.parallelism.pipeline_parallel_microbatch_size
    most = batch * training.seq_len
    if validation.enable:
        most = max(most, validation.local_batch_size * validation.seq_len)
    return -(-most // (pieces * parallel_dims.cp * parallel_dims.tp))
