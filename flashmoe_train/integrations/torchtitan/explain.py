"""What a recipe comes to under TorchTitan, from its job and a model on the meta device."""

import logging
import re
from typing import Any

from torch import nn

from flashmoe_train.explain import Explanation, Setting
from flashmoe_train.integrations import sizes
from flashmoe_train.integrations.sizes import Sizes
from flashmoe_train.integrations.torchtitan import generation, recipes
from flashmoe_train.schema import Recipe

_ROUTED = re.compile(r"\.moe\.(routed_)?experts\.")  # parameters of routed experts, by generation

job, plan = generation.part("job"), generation.part("plan")


def explain(recipe: Recipe, processes: int, everything: bool = False) -> Explanation:
    """Resolves the recipe for that many processes, builds its model without memory and swaps what would be swapped.

    `everything` lists TorchTitan's own defaults too. Raises UsageError for what could not be trained.
    """
    logging.getLogger().setLevel(logging.ERROR)  # TorchTitan warns of what is filled in later
    resolved, config = recipes.resolve(recipe, processes)
    settings = _settings(resolved, config, everything)
    model, of_model, dims, report = plan.build(config, processes)
    facts = job.facts(config)
    return Explanation(
        model=f"{facts.model}: {_parameters(model, of_model)}",
        processes=_shares(dims),
        step=_step(config, dims),
        settings=settings,
        swaps=report,
        operators=sizes.operators(facts.choices, plan.precision(config, processes), of_model),
    )


def _parameters(model: nn.Module, of_model: Sizes) -> str:
    counts = {name: p.numel() for name, p in model.named_parameters()}
    whole, routed = sum(counts.values()), sum(n for name, n in counts.items() if _ROUTED.search(name))
    text = f"{whole / 1e6:,.1f} million parameters"
    if (experts := of_model.experts) is not None and routed:
        at_work = whole - routed + routed * experts.top_k // experts.number
        text += f", {at_work / 1e6:,.1f} million at work for a token"
    return text


def _shares(dims: Any) -> str:
    degrees = {
        "pipeline": dims.pp,
        "replicas": dims.dp_replicate,
        "FSDP": dims.dp_shard,
        "context": dims.cp,
        "tensor": dims.tp,
    }
    product = " × ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "no parallelism"
    experts = f"; experts over {dims.ep}" if dims.ep > 1 else ""
    return f"{dims.world_size}: {product}{experts}"


def _step(config: Any, dims: Any) -> str:
    training, replicas = config.training, dims.dp_replicate * dims.dp_shard
    at_once = training.local_batch_size * replicas
    sequences = training.global_batch_size if training.global_batch_size > 0 else at_once
    turns = f" in {sequences // at_once} turns" if sequences > at_once else ""
    tokens = f"{sequences * training.seq_len:,} tokens = {sequences} sequences of {training.seq_len:,}"
    return f"{tokens}; each of {replicas} data-parallel processes takes {training.local_batch_size} at once{turns}"


def _settings(resolved: recipes.Job, config: Any, everything: bool) -> list[Setting]:
    own = f"[{resolved.name}]" if resolved.name else "job file"
    found = []
    for place, shown, value in job.settings(config):
        if resolved.get(place) is not None:
            found.append(Setting(shown, value, resolved.said_by.get(place, own)))
        elif everything:
            found.append(Setting(shown, value, "TorchTitan's default"))
    return found
