"""Recipes: TOML files that say what to run. Finds, reads and completes them; `schema` says what may be in them.

A job file of TorchTitan is a recipe as it stands: it says all it says under `[torchtitan]`, and what its `[flashmoe]`
table says is `[swap]`.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from flashmoe_train.errors import UsageError, nearest
from flashmoe_train.resources import replace_file, resource
from flashmoe_train.schema import Choice, Recipe, Swap, parse


def find(name: str, kind: str = "recipe") -> Path:
    """The file of a recipe (or config), given as a path or by the name of one that ships with the package.

    Raises UsageError that names the nearest shipped ones.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if path.is_file():
            return path
    folder = resource(f"{kind}s")
    shipped = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.toml"))}
    if name in shipped:
        return shipped[name]
    hint = nearest(Path(name).stem, list(shipped), f"shipped {kind}s: ")
    raise UsageError(f"no {kind} {name!r}: neither a TOML file nor a shipped {kind}; {hint}")


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path, with `table.key=value` overrides applied; a value is TOML, or a string as it
    stands.

    Raises UsageError for a file that is missing or broken, an override of another form, keys and values that the
    schema does not have.
    """
    path = find(name)
    tables = read(path)
    for override in overrides:
        apply(tables, override)
    if "framework" not in tables:
        tables = _of_job_file(tables, path)
    else:
        tables.setdefault("data", {})
        if isinstance(config := tables.get("config"), str):
            tables["model"] = _merged(read(_config(config, path)), tables.get("model", {}))
    tables.setdefault("folder", f"outputs/{path.stem}")
    return parse(Recipe, tables)


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UsageError that says where it is broken."""
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def apply(tables: dict[str, Any], override: str) -> None:
    """Sets what `table.key=value` says in `tables`."""
    name, equals, text = override.partition("=")
    *path, key = name.split(".")
    if not equals or not all((*path, key)):
        raise UsageError(f"an override must be key=value or table.key=value, found {override!r}")
    try:
        value, *more = tomllib.loads(f"value = {text}").values()
    except tomllib.TOMLDecodeError:
        value, more = text, []
    if more:
        raise UsageError(f"an override must be of one value, found {override!r}")
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise UsageError(f"override {override!r}: {part} is a value, not a table")
    tables[key] = value


def with_swap(recipe: Recipe, choice: Choice, folder: str) -> Recipe:
    """The recipe with what it swaps ("flashmoe"), or with nothing swapped ("stock"), run in another folder."""
    swap = recipe.swap if choice == "flashmoe" else Swap(attention="stock", moe="stock")
    return recipe.model_copy(update={"swap": swap, "folder": folder})


def write(recipe: Recipe, path: Path) -> None:
    """Writes the recipe with the sizes of its config and all overrides in it, so that `load` comes to the same."""
    tables = recipe.model_dump(exclude_unset=True, exclude_none=True, exclude={"config"})
    replace_file(path, tomli_w.dumps(tables))  # other processes may be reading it


def _config(name: str, recipe: Path) -> Path:
    """A config's path is relative to the recipe that names it, or to the working folder."""
    beside = recipe.parent / name
    return find(str(beside) if name.endswith(".toml") and beside.is_file() else name, "config")


def _merged(sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a config, with those that a recipe changes."""
    if not isinstance(changes, dict):
        return changes  # the schema refuses it
    inner = {key: _merged(sizes[key], value) for key, value in changes.items() if isinstance(sizes.get(key), dict)}
    return sizes | changes | inner


def _of_job_file(tables: dict[str, Any], path: Path) -> dict[str, Any]:
    if "model" not in tables or "job" not in tables:
        raise UsageError(
            f'{path} says no framework = "torchtitan", and has no tables [job] and [model] as a job file of TorchTitan'
        )
    for key, theirs in {"swap": "[flashmoe]", "folder": "[job] dump_folder"}.items():
        if key in tables:
            raise UsageError(f"{path} is a job file of TorchTitan: what recipes call {key} is {theirs} there")
    recipe = {"framework": "torchtitan", "torchtitan": tables}
    if "flashmoe" in tables:
        recipe["swap"] = parse(Swap, tables.pop("flashmoe"), "flashmoe").model_dump()
    if isinstance(tables["job"], dict) and "dump_folder" in tables["job"]:
        recipe["folder"] = tables["job"].pop("dump_folder")
    return recipe
