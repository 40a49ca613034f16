"""Recipes for TorchTitan 0.3.x's own command, which looks configurations up by name in a module:

    torchrun … -m torchtitan.train --module flashmoe_train.integrations.torchtitan.overrides --config quickstart

`--config` takes whatever `flashmoe train` takes, a path too; TorchTitan's other options then change single settings.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from flashmoe_train.integrations.torchtitan import runner
from flashmoe_train.recipe import find, load


def __getattr__(name: str) -> Callable[[], Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    find(name)  # or there is no such recipe
    return partial(_configuration, name)


def _configuration(name: str) -> Any:
    return runner.prepare(load(name), int(os.environ.get("WORLD_SIZE", "1")), allow_fallback=False)
