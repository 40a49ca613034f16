"""What the bench of whole recipes makes of the runs' summaries."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe_train.bench import train
from flashmoe_train.bench.results import here, read
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.compare import Run
from flashmoe_train.documents import ROOT, curves

BENCH, MEGATRON = train.BENCHES
LOSSES = {
    "stock": [3.0, 2.0],
    "flashmoe": [3.1, 2.300001],
    "stock_again": [3.0, 2.1],
    "stock_deterministic": [3.0, 1.9],
    "stock_other_seed": [3.5, 2.5],
}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def one(case: train.Case, choice: str) -> Run:
        of_overrides = {overrides: control for control, overrides in train.CONTROLS.items()}
        names.append(of_overrides[case.overrides] if choice in names else choice)
        return Run(losses=LOSSES[names[-1]], heldout=None, step_ms=len(names), tokens_per_s=100.0, peak_gib=1.0)

    monkeypatch.setattr(train, "_train", one)
    return names


@pytest.mark.parametrize("controls", [(), ("stock_again",), tuple(train.CONTROLS)])
def test_stock_once_more_is_the_scale_of_differences(
    controls: tuple[str, ...], trained: list[str], tmp_path: Path
) -> None:
    row = BENCH.measure(train.Case("llama3_debug", 1, controls=controls), Stopwatch(torch.device("cpu")))
    assert trained == ["stock", "flashmoe", *controls]
    assert row.ms == {"stock": 1, "flashmoe": 2}  # the second run of stock is no baseline
    results = here("train_torchtitan", "flashmoe bench train", torch.device("cpu"))
    results.rows.append(row)
    results.write(tmp_path / "docs/results/gpu/train_torchtitan.json")
    (stored,) = read(tmp_path / "docs/results/gpu/train_torchtitan.json").rows
    extra: dict[str, Any] = stored.model_extra or {}
    assert extra["loss"] == {name: LOSSES[name] for name in trained}
    scale = {"stock_again": 0.05, "stock_deterministic": 0.05, "stock_other_seed": 0.5}
    differences = {"flashmoe": 0.2} | {control: scale[control] for control in controls}
    assert extra.get("from_stock") == (pytest.approx(differences) if controls else None)
    drawn = [*curves(tmp_path)]
    losses = {name: LOSSES[name] for name in trained}
    assert drawn == ([(tmp_path / "docs/results/gpu/train_torchtitan_llama3_debug.png", losses)] if controls else [])


def test_standard_cases_are_found_by_label_and_others_by_recipe() -> None:
    assert [case.recipe for case in BENCH.matching("llama3_debug*")] == ["llama3_debug"]
    assert BENCH.matching("llama3_debug*")[0].controls
    assert [case.gpus for case in MEGATRON.matching("megatron_*")] == [2, 2, 2]
    assert BENCH.matching("megatron_*") == MEGATRON.matching("qwen3_moe_debug") == ()
    assert BENCH.matching("qwen3_moe_debug") == (train.Case("qwen3_moe_debug", 2),)


def test_every_stored_curve_is_drawn() -> None:
    for path, losses in curves():
        assert path.exists(), "run python -m flashmoe_train.documents"
        assert all(len(own) == len(losses["stock"]) >= 20 for own in losses.values())  # large models log every fifth
        assert f"({path.relative_to(ROOT / 'docs')})" in (ROOT / "docs/torchtitan.md").read_text()
