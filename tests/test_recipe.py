"""Finding, reading and completing recipes."""

from pathlib import Path

import pytest

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.schema import Swap

SIZES = """
architecture = "llama3"
vocab_size = 300
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
[rope_scaling]
rope_type = "llama3"
factor = 8.0
low_freq_factor = 1.0
high_freq_factor = 4.0
original_max_position_embeddings = 8192
"""
JOB = """
[job]
dump_folder = "here"
[model]
name = "deepseek_v3"
flavor = "debugmodel"
converters = ["flashmoe"]
[training]
steps = 3
"""


def test_finds_shipped_recipes_and_files(tmp_path: Path) -> None:
    assert recipe.find("quickstart").name == "quickstart.toml"
    assert recipe.find("llama3_8b", "config").name == "llama3_8b.toml"
    (tmp_path / "mine.toml").write_text("")
    assert recipe.find(str(tmp_path / "mine.toml")) == tmp_path / "mine.toml"


@pytest.mark.parametrize(
    "name, text",
    [("quickstrat", "did you mean 'quickstart'"), ("nothing/like/it.toml", "shipped recipes: .*quickstart")],
)
def test_missing_recipe(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"no recipe '{name}'.*{text}"):
        recipe.find(name)


def test_broken_toml_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[model\nname = 1")
    with pytest.raises(UsageError, match=r"broken.toml is not valid TOML: .*line 1"):
        recipe.load(str(path))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(UsageError, match=r"latin.toml is not valid TOML: .*utf-8"):
        recipe.load(str(tmp_path / "latin.toml"))


def test_overrides() -> None:
    tables = {"training": {"steps": 1}, "model": {"name": "x"}}
    for override in (
        "folder=there",
        "training.steps=5",
        "model.name=y",
        "a.b.c=[1, 2]",
        "model.flag=true",
        "a.text=1=2",
        'data.train={path="json", split="train"}',
    ):
        recipe.apply(tables, override)
    assert tables == {
        "folder": "there",
        "training": {"steps": 5},
        "model": {"name": "y", "flag": True},
        "a": {"b": {"c": [1, 2]}, "text": "1=2"},
        "data": {"train": {"path": "json", "split": "train"}},
    }


@pytest.mark.parametrize(
    "override", ["training.steps", "training.=3", ".steps=3", "=3", "training.steps.x=3", "a=5\nb=7"]
)
def test_wrong_override(override: str) -> None:
    with pytest.raises(UsageError, match="override"):
        recipe.apply({"training": {"steps": 1}}, override)


def test_a_config_gives_the_sizes_and_the_recipe_may_change_some(tmp_path: Path) -> None:
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes/small.toml").write_text(SIZES)
    path = tmp_path / "mine.toml"
    path.write_text('framework = "torchtitan"\nconfig = "sizes/small.toml"\n[model]\nrope_scaling = { factor = 2.0 }')
    loaded = recipe.load(str(path), ["model.num_hidden_layers=3"])
    assert (loaded.model.vocab_size, loaded.model.num_hidden_layers, loaded.folder) == (300, 3, "outputs/mine")
    assert (loaded.model.rope_scaling.factor, loaded.model.rope_scaling.high_freq_factor) == (2.0, 4.0)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config 'llama3_8c'.* did you mean 'llama3_8b'"):
        recipe.load("quickstart", ["config=llama3_8c"])


def test_written_recipes_say_the_same(tmp_path: Path) -> None:
    loaded = recipe.load("quickstart", ["training.steps=7", "model.num_hidden_layers=2", "parallel.tensor=2"])
    recipe.write(loaded, tmp_path / "recipe.toml")
    again = recipe.load(str(tmp_path / "recipe.toml"))
    assert again == loaded.model_copy(update={"config": None})
    assert again.training.model_fields_set == loaded.training.model_fields_set


def test_job_files_are_recipes(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(JOB + '[flashmoe]\nmoe = "stock"\n')
    loaded = recipe.load(str(path), ["training.steps=5"])
    assert (loaded.folder, loaded.swap, loaded.model, loaded.data) == ("here", Swap(moe="stock"), None, None)
    assert loaded.torchtitan["training"] == {"steps": 5}
    with pytest.raises(UsageError, match=r"unknown key \[flashmoe\] moes; did you mean 'moe'"):
        recipe.load(str(path), ["flashmoe.moes=stock"])
    for override, text in (("swap.moe=stock", r"swap is \[flashmoe\]"), ("folder=x", r"folder is \[job\] dump_folder")):
        with pytest.raises(UsageError, match=text):
            recipe.load(str(path), [override])


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nsteps = 1")
    with pytest.raises(UsageError, match=r'says no framework = "torchtitan", and has no tables \[job\] and \[model\]'):
        recipe.load(str(path))


def test_with_swap() -> None:
    changed = recipe.with_swap(recipe.load("quickstart"), "stock", "there")
    assert (changed.swap, changed.folder) == (Swap(attention="stock", moe="stock"), "there")
