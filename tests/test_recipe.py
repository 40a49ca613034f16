"""Finding recipes and applying overrides."""

from pathlib import Path

import pytest

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError


def test_finds_shipped_recipes_and_files(tmp_path: Path) -> None:
    assert recipe.find("quickstart").name == "quickstart.toml"
    (tmp_path / "mine.toml").write_text("")
    assert recipe.find(str(tmp_path / "mine.toml")) == tmp_path / "mine.toml"


@pytest.mark.parametrize(
    "name, text",
    [("quickstrat", "did you mean 'quickstart'"), ("nothing/like/it.toml", "shipped recipes: quickstart")],
)
def test_missing_recipe(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        recipe.find(name)


def test_broken_toml_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[model\nname = 1")
    with pytest.raises(UsageError, match=r"broken.toml is not valid TOML: .*line 1"):
        recipe.load(path)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[training]\nsteps = 1\n[model]\nname = 'x'\n")
    overrides = ["training.steps=5", "model.name=y", "a.b.c=[1, 2]", "model.flag=true", "a.text=1=2"]
    assert recipe.load(path, overrides) == {
        "training": {"steps": 5},
        "model": {"name": "y", "flag": True},
        "a": {"b": {"c": [1, 2]}, "text": "1=2"},
    }


@pytest.mark.parametrize("override", ["steps=3", "training.steps", "training.=3", ".steps=3", "training.steps.x=3"])
def test_wrong_override(override: str) -> None:
    with pytest.raises(UsageError, match="override"):
        recipe.apply({"training": {"steps": 1}}, override)
