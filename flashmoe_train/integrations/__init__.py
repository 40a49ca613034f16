"""One folder a framework: all that is known about it and its versions is there and nowhere else.

What the commands need of one:
- `runner.run(recipe, command, allow_fallback)` trains in this process of a torchrun job;
- `explain.explain(recipe, processes)` says what a recipe comes to, without training;
- `recipes.weights_of(recipe)` are those that it starts from itself, or None;
- `recipes.seed(recipe, folder)` and `recipes.starting_from(recipe, weights)` let runs start from the same weights: the
  first is a recipe that writes them and where, or None if stock and swapped runs begin alike by themselves.
"""

import importlib
from types import ModuleType


def part(framework: str, name: str) -> ModuleType:
    """That module of a framework's folder; frameworks are imported only when they are used."""
    return importlib.import_module(f"{__name__}.{framework}.{name}")
