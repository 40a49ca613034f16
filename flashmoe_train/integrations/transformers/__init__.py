"""Hugging Face Transformers' models: attention and experts by the names under which Transformers looks them up.

    flashmoe_train.swap(model)

sets `attn_implementation` and `experts_implementation` of the model's configuration to "flashmoe". Modules, parameters
and what `save_pretrained` writes stay as they are.
"""

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

from packaging.version import Version
from torch import nn

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.transformers.families import ATTENTION, MINIMUM
from flashmoe_train.swap import Report, Row

# Before anything of it is imported, some of which older versions have not.
if Version(importlib.metadata.version("transformers")) < Version(MINIMUM):
    raise UsageError(
        f"transformers {MINIMUM} or later is needed to swap its models, found "
        f"{importlib.metadata.version('transformers')}"
    )

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flashmoe_train.integrations.transformers import experts
from flashmoe_train.integrations.transformers.attention import attention_forward
from flashmoe_train.integrations.transformers.masks import make_mask

__all__ = ["NAME", "swap_model"]

NAME = "flashmoe"  # of both implementations
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, make_mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, experts.experts_forward)

Found = list[tuple[str, Any, str | None]]  # name, module, why not


def swap_model(model: nn.Module, parts: set[str], dry_run: bool) -> Report:
    """Swaps attention and experts, as far as they are among `parts`, of every Transformers model in `model`."""
    report = Report(planned=dry_run)
    if "attention" in parts:
        found = [(n, m, attention_why_not(m)) for n, m in model.named_modules() if _is_attention(m)]
        report += _set(found, "_attn_implementation", dry_run)
    if "experts" in parts:
        found = [(n, m, experts.why_not(m)) for n, m in model.named_modules() if experts.is_experts(m)]
        report += _set(found, "_experts_implementation", dry_run)
    return report


def _is_attention(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return type(module).__name__.endswith("Attention") and hasattr(config, "_attn_implementation")


def attention_why_not(module: Any) -> str | None:
    """None if this attention module is ours to compute, else the reason why not."""
    name = type(module).__name__
    if name not in ATTENTION:
        known = ", ".join(name for name, reason in ATTENTION.items() if reason is None)
        return f"there is no adapter for {name}; there are some for {known}"
    if (reason := ATTENTION[name]) is not None:
        return reason
    if getattr(module, "attention_dropout", 0.0):
        return f"its attention dropout is {module.attention_dropout}, and our operator has none"
    return None


def _set(found: Found, setting: str, dry_run: bool) -> Report:
    """Modules that share a configuration share its setting: all of them are swapped, or none."""
    report = Report(planned=dry_run)
    stays: dict[int, str] = {}  # by configuration: the first class that is left alone
    for _, module, reason in found:
        if reason is not None:
            stays.setdefault(id(module.config), type(module).__name__)
    configs: dict[int, Any] = {}
    for name, module, reason in found:
        config, kind = module.config, type(module).__name__
        if reason is None and id(config) in stays:
            reason = f"it shares its configuration with {stays[id(config)]}, which is left alone"
        elif reason is None and id(config) not in configs and getattr(config, setting) == NAME:
            reason = "swapped already"
        if reason is None:
            configs[id(config)] = config
        report.rows.append(Row(name, kind, None if reason else f'{setting[1:]}="{NAME}"', reason or ""))
    if not dry_run:
        report.undo = [_assign(config, setting) for config in configs.values()]
    return report


def _assign(config: Any, setting: str) -> Callable[[], None]:
    """Sets it, of this configuration and none that it holds; returns what sets it back."""
    undo = partial(setattr, config, setting, {"": getattr(config, setting)})
    setattr(config, setting, {"": NAME})
    return undo
