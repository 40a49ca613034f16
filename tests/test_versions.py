"""versions.toml is the one place that says what works together: README and constraints follow it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from flashmoe_train import versions

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_table() -> None:
    assert versions.table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", ["constraints.txt", "requirements-titan03.txt"])
def test_environments_are_tested_combinations(file: str) -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / file).read_text(), re.M))
    pair = {"torch": ".".join(pinned["torch"].split(".")[:2]), "version": pinned["torchtitan"]}
    assert any(pair.items() <= entry.items() for entry in versions.tested("torchtitan"))


def test_megatron_is_installed_as_tested() -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert pinned["megatron-core"] in {entry["version"] for entry in versions.tested("megatron-core")}


def test_extra_admits_every_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {r.name: r.specifier for r in map(Requirement, project["optional-dependencies"]["torchtitan"])}
    for entry in versions.tested("torchtitan"):
        assert requirements["torchtitan"].contains(entry["version"])
        assert requirements["torch"].contains(entry["torch"])
    requirements = {r.name: r.specifier for r in map(Requirement, project["optional-dependencies"]["megatron"])}
    for entry in versions.tested("megatron-core"):
        assert requirements["megatron-core"].contains(entry["version"])


def test_broken_combinations_belong_to_one_torch() -> None:
    assert versions.broken("torchtitan", Version("2.13.0+cpu"))
    assert not versions.broken("torchtitan", Version("2.11.0"))


def test_broken_combinations_belong_to_one_version_of_the_framework() -> None:
    assert versions.broken("torchtitan", Version("2.13.0"), "0.2.2")
    assert not versions.broken("torchtitan", Version("2.13.0"), "0.3.0")
