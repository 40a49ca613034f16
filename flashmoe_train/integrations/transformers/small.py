"""Small models of the families, with random weights; and what `flashmoe_train.swap` says of each."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flashmoe_train.integrations.transformers.families import FAMILIES
from flashmoe_train.swap import swap


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A small model of that family, of these weights whenever it is built; `changes` are of its configuration."""
    (family,) = (family for family in FAMILIES if family.model_type == model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **family.sizes | changes))


def table() -> Iterator[tuple[str, ...]]:
    """Heading, then a line a family: what a swap does to it, by the swap's own report."""
    yield ("family", "`model_type`", "attention", "experts")
    for family in FAMILIES:
        model = build(family.model_type)
        found = {"attention": "", "experts": ""}
        for row in swap(model, dry_run=True).rows:
            part = "attention" if row.found == family.attention else "experts"
            found[part] = "swapped" if row.became else f"stock: {row.reason}"
        yield (family.title, f"`{family.model_type}`", found["attention"], found["experts"] or "has none")
