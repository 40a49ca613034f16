"""What a TorchTitan 0.3.x configuration comes to: its model on the meta device, after overrides, and its mesh."""

from typing import Any

import torch
from torch import nn
from torchtitan.config import apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.sizes import Sizes
from flashmoe_train.integrations.torchtitan.overrides import models
from flashmoe_train.swap import Report, Row


def build(config: Trainer.Config, processes: int) -> tuple[nn.Module, Sizes, ParallelDims, Report]:
    """The model without memory, with what would be swapped in it. Raises UsageError for what could not be trained.
    Changes the configuration as training would."""
    found = config.model_spec
    assert found is not None
    found.model.update_from_config(config=config)
    before = classes(config)
    if config.override.imports:
        apply_overrides(config.override, config)
    with torch.device("meta"):
        model = found.model.build()
    return model, models.sizes(found), ParallelDims.from_config(config.parallelism, processes), report(before, config)


def precision(config: Trainer.Config, processes: int) -> str:
    """The dtype of products on that many processes: FSDP mixes precisions in every layout."""
    return config.training.mixed_precision_param


def classes(config: Trainer.Config) -> dict[str, str]:
    """The class that each entry of the model's configuration builds, by name."""
    assert config.model_spec is not None
    entries = config.model_spec.traverse(Module.Config, recurse=True)
    return {name.removeprefix("model."): _built(entry) for name, entry, _, _ in entries}


def report(before: dict[str, str], config: Trainer.Config) -> Report:
    """What overrides have replaced in the model. Raises UsageError if they were to replace something and found
    nothing."""
    after = classes(config)
    rows = [Row(name, old, after[name], "") for name, old in before.items() if after.get(name, old) != old]
    if config.override.imports and not rows:
        raise UsageError(f"nothing was swapped by {', '.join(map(str, config.override.imports))}")
    return Report(rows)


def _built(entry: Any) -> str:
    return type(entry)._owner.__name__
