"""What a recipe comes to under Megatron, from its configurations and a model on the meta device."""

import copy
import dataclasses

import torch
import torch.distributed as dist
from torch import nn

from flashmoe_train.explain import Explanation, Setting
from flashmoe_train.integrations import sizes
from flashmoe_train.integrations.megatron import cpu, models, recipes, runner, specs
from flashmoe_train.integrations.megatron.recipes import Plan
from flashmoe_train.schema import Parallel, Recipe


def explain(recipe: Recipe, processes: int, everything: bool = False) -> Explanation:
    """Resolves the recipe for that many processes and builds its whole model without memory.

    `everything` lists Megatron's own defaults too. Raises UsageError for what could not be trained.
    """
    plan = recipes.resolve(recipe, processes)
    model = whole_model(recipe)
    return Explanation(
        model=f"{plan.model.architecture}: {_parameters(model, plan)}",
        processes=_shares(plan),
        step=_step(plan),
        settings=_settings(plan, everything),
        swaps=specs.report(model),
        operators=sizes.operators(recipe.swap, str(plan.dtype).removeprefix("torch."), models.sizes(plan.model)),
    )


def whole_model(recipe: Recipe) -> nn.Module:
    """All of the model on the meta device, as one process would have it."""
    from megatron.core import parallel_state

    alone = recipe.model_copy(update={"parallel": Parallel()})
    own = {k: v for k, v in recipe.megatron.items() if k not in ("sequence_parallel", "expert_tensor_parallel_size")}
    plan = recipes.resolve(alone.model_copy(update={"megatron": own}), 1)
    config = copy.copy(plan.config)
    config.perform_initialization = False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with cpu.adjusted(), torch.device("meta"):
            parallel_state.initialize_model_parallel()
            return runner.build_model(dataclasses.replace(plan, config=config))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _parameters(model: nn.Module, plan: Plan) -> str:
    counts = {name: p.numel() for name, p in model.named_parameters()}
    whole, routed = sum(counts.values()), sum(n for name, n in counts.items() if ".mlp.experts." in name)
    text = f"{whole / 1e6:,.1f} million parameters"
    if (moe := plan.model.moe) is not None:
        at_work = whole - routed + routed * moe.num_experts_per_tok // moe.num_experts
        text += f", {at_work / 1e6:,.1f} million at work for a token"
    return text


def _shares(plan: Plan) -> str:
    layout = plan.layout
    degrees = {"pipeline": layout.pipeline, "data": layout.data, "tensor": layout.tensor}
    product = " × ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "no parallelism"
    experts = f"; experts over {layout.expert}" if layout.expert > 1 else ""
    if plan.sharing is not None:
        experts += f", by our exchange of at most {plan.sharing.tokens:,} tokens from each"
    return f"{layout.processes}: {product}{experts}"


def _step(plan: Plan) -> str:
    layout = plan.layout
    turns = f" in {layout.turns} turns" if layout.turns > 1 else ""
    tokens = f"{layout.sequences * plan.seq_len:,} tokens = {layout.sequences} sequences of {plan.seq_len:,}"
    return f"{tokens}; each of {layout.data} data-parallel processes takes {layout.micro_batch} at once{turns}"


def _settings(plan: Plan, everything: bool) -> list[Setting]:
    found = []
    known = {"config": plan.config, "optimizer": plan.optimizer, "ddp": plan.ddp}
    for table, arguments in plan.job.tables.items():
        own = "[megatron]" if table == "config" else f"[megatron.{table}]"
        shown = "" if table == "config" else f"{table}."
        for key, value in arguments.items():
            found.append(Setting(f"{shown}{key}", _text(value), plan.job.said_by.get(f"{table}.{key}", own)))
        if everything and table in known:
            for field in dataclasses.fields(known[table]):
                if field.name not in arguments:
                    value = getattr(known[table], field.name)
                    found.append(Setting(f"{shown}{field.name}", _text(value), "Megatron's default"))
    found += [Setting(f"GPTModel {key}", value, "[model]") for key, value in plan.arguments.items()]
    return found


def _text(value: object) -> object:
    return getattr(value, "__name__", value)
