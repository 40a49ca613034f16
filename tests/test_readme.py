"""The examples of README and docs work as they stand, and tables say what is so."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan.explain import explain
from flashmoe_train.schema import Checkpoint, Data, Parallel, Recipe, Swap, Training

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs/recipes.md").read_text()
PYTHON = [
    (path.name, text)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for text in re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
]
TOML = re.findall(r"```toml\n(.*?)```", README, re.S)


@pytest.mark.parametrize("page, example", PYTHON, ids=[page for page, _ in PYTHON])
def test_python_example_runs(page: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(compile(example, page, "exec"), {"__name__": "example"})
    losses = [float(x) for x in re.findall(r"step \d+: ([\d.]+) nats", capsys.readouterr().out)]
    assert ("optimizer" in example) == bool(losses)  # the one that trains says what it learnt
    assert not losses or losses[-1] < losses[0] - 2.5


@pytest.mark.parametrize("command", re.findall(r"^flashmoe explain (.+?)(?:  +#|$)", README, re.M))
def test_recipe_is_explained(command: str) -> None:
    """With two processes, as where there is no GPU."""
    name, *overrides = shlex.split(command)
    assert explain(recipe.load(name, overrides), 2).model


def test_pages_are_linked() -> None:
    """Every page can be reached from the README, and no link leads nowhere."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", prose):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"
            if path.suffix == ".md":
                todo.append(path)
    assert reached >= set((ROOT / "docs").rglob("*.md"))


def test_tree_is_whole() -> None:
    """All of csrc, and of the package's first level, is where a newcomer looks for it."""
    (tree,) = re.findall(r"```\n(csrc/.*?)```", README, re.S)
    sources = {path.name + "/" for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    sources |= {path.name for path in (ROOT / "csrc").glob("*/*.cu")}
    package = {path.name for path in (ROOT / "flashmoe_train").glob("*.py")} - {"__init__.py"}
    package |= {path.parent.name + "/" for path in (ROOT / "flashmoe_train").glob("*/__init__.py")}
    assert not {name for name in sources | package if name not in tree}


@pytest.mark.parametrize("example", [text for text in TOML if "framework" in text])
def test_recipe_example_is_one(example: str, tmp_path: Path) -> None:
    (tmp_path / "example.toml").write_text(example)
    explain(recipe.load(str(tmp_path / "example.toml")), 2)


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 3 and len(TOML) >= 2 and all(tomllib.loads(text) for text in TOML)


@pytest.mark.parametrize("table", [Recipe, Swap, Data, Training, Parallel, Checkpoint])
def test_every_key_is_explained(table: type[BaseModel]) -> None:
    named = re.search(r"## Keys\n(.*?)\n## ", RECIPES, re.S)
    assert named is not None
    for key in table.model_fields:
        assert re.search(rf"`(\[?{key}|\[{key}\.\*)\]?`", named[1]), key


CONFIGS = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) ([MB]) \| ([\d.]+) [MB] \|$", RECIPES, re.M)


@pytest.mark.parametrize("name, whole, unit, at_work", CONFIGS)
def test_sizes_of_configs(name: str, whole: str, unit: str, at_work: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'framework = "torchtitan"\nconfig = "{name}"')
    model = explain(recipe.load(str(tmp_path / "a.toml")), 1).model
    counts = [float(n.replace(",", "")) for n in re.findall(r"([\d,.]+) million", model)]
    scale = {"M": 1, "B": 1000}[unit]
    assert [f"{n / scale:.1f}" for n in (counts[0], counts[-1])] == [whole, at_work]


def test_every_config_is_in_the_table() -> None:
    assert {name for name, *_ in CONFIGS} == {path.stem for path in (ROOT / "configs").glob("*.toml")}
