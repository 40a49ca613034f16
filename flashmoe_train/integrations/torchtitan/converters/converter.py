"""The model converter "flashmoe": TorchTitan calls it on the model on the meta device, before any parallelism."""

import importlib

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.tools.logging import logger

from flashmoe_train.integrations import sizes
from flashmoe_train.integrations.torchtitan import core
from flashmoe_train.integrations.torchtitan.config import FlashMoE, validate
from flashmoe_train.integrations.torchtitan.converters import attention, compat, context, dispatch, moe
from flashmoe_train.swap import Report, swap_modules


def choices(job_config: JobConfig) -> FlashMoE:
    """The [flashmoe] table; without [job] custom_config_module there is none, and its defaults hold."""
    return getattr(job_config, "flashmoe", None) or FlashMoE()


class FlashMoEConverter:
    """Swaps what the `[flashmoe]` table says (by default everything it knows)."""

    last_report: Report | None = None  # of the latest convert() in this process, for the summary of a run

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        self.config = choices(job_config)
        validate(self.config)
        compat.check_job(job_config, parallel_dims, self.config)
        self.job_config, self.parallel_dims = job_config, parallel_dims

    def convert(self, model: nn.Module) -> None:
        report = Report()
        if self.config.attention == "flashmoe":
            report += swap_modules(model, attention.swaps(model))
            if self.parallel_dims.cp_enabled:
                context.prepare(self.job_config, (attention.FlashMoEAttention,))
            self._save_in_selective_checkpointing(core.ATTENTION_OPERATORS)
        if self.config.moe == "flashmoe":
            over_ranks = self.config.dispatch == "flashmoe" and self.parallel_dims.ep_enabled
            swaps = moe.swaps_over_ranks(model) if over_ranks else moe.swaps(model)
            if over_ranks:
                dispatch.check(self.job_config, self.parallel_dims, model.model_args)
            report += swap_modules(model, swaps, optional=True)  # a dense model has none
            if over_ranks:
                dispatch.prepare(model, self.job_config, self.parallel_dims, self.config)
            else:
                dispatch.release()
            self._save_in_selective_checkpointing(core.MOE_OPERATORS)
        for modules, found, became, count in report.summary():
            logger.info(f"flashmoe: {count} × {modules}: {found} -> {became}")
        dtype = compat.precision(self.job_config, self.parallel_dims)
        for operator, runs in sizes.operators(self.config, dtype, compat.sizes(model.model_args)):
            logger.info(f"flashmoe: {operator} runs on {runs}")
        FlashMoEConverter.last_report = report

    def _save_in_selective_checkpointing(self, operators: tuple[torch._ops.OpOverload, ...]) -> None:
        """Adds operators to those whose outputs the model's selective activation checkpointing keeps, a module-level
        set in `torchtitan.models.<name>.infra.parallelize`."""
        name = self.job_config.model.name
        try:
            module = importlib.import_module(f"torchtitan.models.{name}.infra.parallelize")
            module._op_sac_save_list.update(operators)
        except (ModuleNotFoundError, AttributeError):
            logger.warning(f"flashmoe: {name} has no list of operators to save in selective checkpointing")

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Part of TorchTitan's converter protocol; there is nothing to do."""


register_model_converter(FlashMoEConverter, "flashmoe")
