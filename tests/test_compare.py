"""Stock and swapped runs side by side."""

import io
import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flashmoe_train import cli, launch, recipe
from flashmoe_train.compare import compare
from flashmoe_train.errors import UsageError
from flashmoe_train.schema import Recipe


def summary(losses: list[float], tokens_per_s: float, heldout: float | None = None) -> dict[str, Any]:
    steps = [{"loss": loss, "seconds": 1 / tokens_per_s, "tokens_per_s": tokens_per_s} for loss in losses]
    steps[0] |= {"seconds": 100.0, "tokens_per_s": 0.01}  # the first steps compile
    checks = [] if heldout is None else [{"step": len(losses), "loss": heldout}]
    return {"steps": steps, "heldout": checks, "peak_gib_per_device": 2.0}


@pytest.fixture
def results() -> list[dict[str, Any]]:
    """What runs end with: a seed checkpoint, stock, swapped."""
    stock = [3.0, 2.5, 2.0, 1.5, 1.25, 1.125, 1.0]
    swapped = [loss + (0.001 if i == 5 else 0) for i, loss in enumerate(stock)]
    return [{}, summary(stock, 100, 1.5), summary(swapped, 150, 1.25)]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, results: list[dict[str, Any]]) -> list[tuple[Recipe, int, bool]]:
    """Runs that `compare` starts, which end at once."""
    runs: list[tuple[Recipe, int, bool]] = []

    def train(given: Recipe, processes: int, *, allow_fallback: bool, show: bool) -> dict[str, Any]:
        runs.append((given, processes, allow_fallback))
        Path(str(given.folder)).mkdir(parents=True)
        return results[len(runs) - 1]

    monkeypatch.setattr(launch, "train", train)
    return runs


def test_both_start_from_one_seed_checkpoint(started: list[tuple[Recipe, int, bool]], tmp_path: Path) -> None:
    text = io.StringIO()
    loaded = recipe.load("quickstart", [f"folder={tmp_path}/run"])
    difference = compare(loaded, 2, False, Console(file=text, width=120))
    assert difference == pytest.approx(1e-3)
    (seed, one, _), *both = started
    assert one == 1 and seed.torchtitan["checkpoint"]["create_seed_checkpoint"]
    assert [(run.swap.attention, run.swap.moe, n, fallback) for run, n, fallback in both] == [
        ("stock", "stock", 2, False),
        ("flashmoe", "flashmoe", 2, False),
    ]
    for run, _, _ in both:
        assert run.checkpoint.start_from == f"{seed.folder}/checkpoint/step-0"
        assert run.torchtitan["checkpoint"] == {"enable": True, "load_only": True}
    written = json.loads((tmp_path / "run/compare/compare.json").read_text())
    assert written["stock"]["tokens_per_s"] == 100 and written["flashmoe"]["heldout"] == 1.25
    assert (tmp_path / "run/compare/compare.png").read_bytes().startswith(b"\x89PNG")
    assert written["mean_difference"] == pytest.approx(1e-3 / 7)
    for part in ("1.50", "1.4e-04 in the mean; at most 1.0e-03, of logged step 6 of 7", "held-out", "peak memory"):
        assert part in text.getvalue()


@pytest.mark.parametrize("key", ["checkpoint.start_from", "torchtitan.checkpoint.initial_load_path"])
def test_given_weights_are_where_both_start(
    key: str, started: list[tuple[Recipe, int, bool]], results: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/.metadata").touch()
    del results[0]  # no seed checkpoint
    compare(recipe.load("quickstart", [f"folder={tmp_path}/run", f"{key}={tmp_path}/weights"]), 2, False, Console())
    assert [run.checkpoint.start_from for run, _, _ in started] == [f"{tmp_path}/weights"] * 2
    assert [run.torchtitan["checkpoint"] for run, _, _ in started] == [{"enable": True, "load_only": True}] * 2


def test_compares_what_the_recipe_swaps(started: list[tuple[Recipe, int, bool]], tmp_path: Path) -> None:
    compare(recipe.load("quickstart", [f"folder={tmp_path}/run", "swap.moe=stock"]), 2, False, Console())
    assert [(run.swap.attention, run.swap.moe) for run, _, _ in started[1:]] == [("stock",) * 2, ("flashmoe", "stock")]
    with pytest.raises(UsageError, match="swaps nothing"):
        compare(recipe.load("quickstart", ["swap.moe=stock", "swap.attention=stock"]), 2, False, Console())


def test_what_could_not_be_trained_starts_nothing(started: list[tuple[Recipe, int, bool]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be shared by 3"):
        compare(recipe.load("quickstart", [f"folder={tmp_path}/run"]), 3, False, Console())
    assert started == []


@pytest.mark.parametrize("run, step", [(1, 6), (2, 1)])
def test_a_loss_that_is_no_number_is_no_agreement(
    run: int, step: int, started: object, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    results[run]["steps"][step]["loss"] = float("nan")
    text = io.StringIO()
    difference = compare(recipe.load("quickstart", [f"folder={tmp_path}/run"]), 2, False, Console(file=text))
    assert isnan(difference) and f"nan, of logged step {step + 1} of 7" in text.getvalue()


@pytest.mark.parametrize("tolerance, code", [("1e-2", 0), ("1e-4", 1)])
def test_tolerance(tolerance: str, code: int, started: object, tmp_path: Path) -> None:
    arguments = ["compare", "quickstart", f"folder={tmp_path}/run", f"--tolerance={tolerance}"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == code, result.output


def test_a_run_that_fails_ends_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(*args: object, **options: object) -> dict[str, Any]:
        raise launch.RunError("ended with 3")

    monkeypatch.setattr(launch, "train", train)
    result = CliRunner().invoke(cli.app, ["compare", "quickstart", f"folder={tmp_path}/run"])
    assert result.exit_code == 1 and "error: ended with 3" in result.output


@pytest.mark.slow
def test_compares_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    loaded = recipe.load("qwen3_moe_debug", [f"folder={tmp_path}/run", "training.steps=3", "training.seq_len=64"])
    difference = compare(loaded, 2, True, Console())
    assert difference <= 1e-4
    written = json.loads((tmp_path / "run/compare/compare.json").read_text())
    assert written["stock"]["losses"][-1] < written["stock"]["losses"][0] - 0.5


def test_a_failed_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    loaded = recipe.load("quickstart", [f"folder={tmp_path}/run"])
    with pytest.raises(launch.RunError, match="global_batch_size = 8 cannot be shared by 3"):
        launch.train(loaded, 3, allow_fallback=True, show=False)
