"""What works together, read from versions.toml."""

import tomllib
from functools import cache
from typing import Any

from packaging.version import Version

from flashmoe_train.resources import resource


@cache
def _load() -> dict[str, list[dict[str, Any]]]:
    with open(resource("versions.toml"), "rb") as f:
        return tomllib.load(f)


def tested(framework: str | None = None) -> list[dict[str, Any]]:
    """The combinations the test suite passed with, of one framework or all."""
    return [entry for entry in _load()["tested"] if framework in (None, entry["framework"])]


def broken(framework: str, torch: Version, version: str | None = None) -> list[dict[str, Any]]:
    """Feature combinations that the framework's own code, of that version or of any, is known not to run with this
    torch."""
    return [
        entry
        for entry in _load().get("broken", [])
        if entry["framework"] == framework
        and version in (None, entry["version"])
        and torch.release[:2] == Version(entry["torch"]).release[:2]
    ]


def table(framework: str | None = None) -> str:
    """`tested` as a Markdown table."""
    lines = ["| framework | version | torch | Python | tested on |", "|---|---|---|---|---|"]
    for entry in tested(framework):
        lines.append(
            "| " + " | ".join(entry[key] for key in ("framework", "version", "torch", "python", "where")) + " |"
        )
    return "\n".join(lines)
