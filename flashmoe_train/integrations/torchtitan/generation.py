"""Which TorchTitan is installed, by what it offers and not by its number: the one place that asks.

TorchTitan 0.2.x swaps modules of a built model by *converters*, 0.3.x replaces entries of a configuration before
anything is built by *overrides*. The folders of these names hold what only one of the two needs; both have the modules
`job`, `models`, `plan` and `trainer`, with the same functions and classes, which the files beside this one use by
`part`.
"""

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from flashmoe_train import versions
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.config import FlashMoE

OURS = "flashmoe train"  # who says what neither the user nor TorchTitan does


class Facts(NamedTuple):
    """Of a configuration, what each generation keeps in a place of its own."""

    model: str
    folder: Path
    tokenizer: str
    dataset: str
    validates: bool
    choices: FlashMoE


# By file, because importing a version that is made for another torch may fail before it can be named.
_EXTENSION_POINTS = {"converters": "protocols/model_converter.py", "overrides": "config/override.py"}


def find() -> str:
    """ "converters" or "overrides". Raises UsageError unless a TorchTitan is installed that has one of them."""
    torchtitan = importlib.util.find_spec("torchtitan")
    if torchtitan is None or not torchtitan.submodule_search_locations:
        raise UsageError("TorchTitan is not installed: pip install 'flashmoe-train[torchtitan]'")
    for generation, file in _EXTENSION_POINTS.items():
        if any((Path(folder) / file).exists() for folder in torchtitan.submodule_search_locations):
            return generation
    raise UsageError(
        f"torchtitan {importlib.metadata.version('torchtitan')} has neither model converters nor configuration "
        f"overrides. What works together:\n{versions.table('torchtitan')}"
    )


name = cache(find)


def part(module: str) -> ModuleType:
    """That module of the installed generation's folder."""
    return importlib.import_module(f"{__package__}.{name()}.{module}")
