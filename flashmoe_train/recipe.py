"""Recipes: TOML files that say what to run. For now a recipe is a TorchTitan job file as it stands."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.resources import resource


def find(name: str) -> Path:
    """The file of a recipe, given as a path or by the name of one that ships with the package.

    Raises UsageError that names the nearest shipped recipes.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if path.is_file():
            return path
    shipped = {path.stem: path for path in sorted(resource("recipes").glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    hint = nearest(Path(name).stem, list(shipped), "shipped recipes: ")
    raise UsageError(f"no recipe {name!r}: neither a TOML file nor a shipped recipe; {hint}")


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's tables, with `table.key=value` overrides applied; a value is TOML, or a string as it stands.

    Raises UsageError that says where the TOML is broken or which override is not of that form.
    """
    try:
        with open(path, "rb") as f:
            tables = tomllib.load(f)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        apply(tables, override)
    return tables


def apply(tables: dict[str, Any], override: str) -> None:
    """Sets what `table.key=value` says in `tables`."""
    name, equals, text = override.partition("=")
    *path, key = name.split(".")
    if not equals or not path or not all((*path, key)):
        raise UsageError(f"an override must be table.key=value, found {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise UsageError(f"override {override!r}: {part} is a value, not a table")
    tables[key] = value
