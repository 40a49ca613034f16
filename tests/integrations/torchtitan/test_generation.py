"""Which generation of TorchTitan is installed, and what is said if it is none that we know."""

import types
from pathlib import Path

import pytest

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import generation


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    found = types.SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)


@pytest.mark.parametrize(
    "file, name", [("protocols/model_converter.py", "converters"), ("config/override.py", "overrides")]
)
def test_is_found_by_what_it_offers(file: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).touch()
    installed(monkeypatch, tmp_path)
    assert generation.find() == name


def test_refuses_other_torchtitans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="TorchTitan is not installed: pip install"):
        generation.find()
    installed(monkeypatch, tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    with pytest.raises(
        UsageError,
        match=r"torchtitan 9\.9 has neither model converters nor configuration overrides(?s:.*)\| torchtitan \| 0.2.2",
    ):
        generation.find()


def test_both_generations_have_the_same_parts() -> None:
    folder = Path(generation.__file__).parent
    for part in ("job", "models", "plan", "trainer"):
        assert all((folder / name / f"{part}.py").is_file() for name in ("converters", "overrides"))
