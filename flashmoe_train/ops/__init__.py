"""Operators: one folder or file a family, with its schema, reference, fake, autograd, FLOPs, sharding and `supports()`.

Imports torch and nothing else. `torch.ops.flashmoe.*` are the operators; the public functions are what to call.
"""

import importlib
from types import ModuleType

_FAMILIES = ("attention", "expert_parallel", "moe")


def __getattr__(name: str) -> ModuleType:
    if name not in _FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def load_all() -> None:
    """Registers the operators of every family, for what lists them. Others want those that they import."""
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
