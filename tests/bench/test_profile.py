"""Where the time of a step goes, from a run to the tables."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe_train import launch
from flashmoe_train.bench import Options, profile, run, train
from flashmoe_train.bench.results import Row, here, read
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.bench.train import Case, recipe_as_measured
from flashmoe_train.compare import Run
from flashmoe_train.documents import documents

(BENCH,) = profile.BENCHES
PARTS = {
    "other attention": {"ms": 30.0, "hidden": 0.0, "launches": 2},
    "exchange": {"ms": 9.0, "hidden": 4.0, "launches": 1},
}
FOUND: dict[str, Any] = {
    "parts": PARTS,
    "busy_ms": 35.0,
    "traced_ms": 50.0,
    "kernels": [{"name": "kernel<int>", "part": "exchange", "ms": 9.0, "launches": 1}],
    "waits": {"stream, event or device awaited": 7},
}


def test_tables_of_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def traced(case: Case, choice: str) -> tuple[Run, dict[str, Any]]:
        if choice == "flashmoe":
            raise launch.RunError("ValueError: no")
        return Run(losses=[3.0], heldout=None, step_ms=48.0, tokens_per_s=100.0, peak_gib=1.0), FOUND

    monkeypatch.setattr(profile, "_traced", traced)
    row = BENCH.measure(Case("quickstart", 2), Stopwatch(torch.device("cpu")))
    assert row.ms == {"stock": 48.0} and row.failed == {"flashmoe": "ValueError: no"}
    (_, steps), (_, kernels) = BENCH.tables(row)
    assert steps == [
        ["", "stock"],
        ["other attention", "30.0"],
        ["exchange", "9.0 (4.0)"],
        ["nothing at work", "15.0"],
        ["traced step", "50.0"],
        ["other steps, median", "48.0"],
        ["tokens/s per device", "100"],
        ["peak memory, GiB", "1.0"],
        ["kernels, copies and fills launched", "3"],
        ["stream, event or device awaited", "7"],
    ]
    assert kernels[1] == ["`kernel<int>`", "stock", "exchange", "1", "9.0"]
    assert [*BENCH.tables(Row(case={}, label="skipped"))] == []

    results = here(BENCH.name, "flashmoe bench profile", torch.device("cpu"))
    results.rows.append(row)
    results.write(tmp_path / "docs/results/gpu/profile_torchtitan.json")
    (tmp_path / "README.md").write_text("<!-- results: gpu/profile_torchtitan quick* -->\n<!-- end of table -->\n")
    ((_, text),) = documents(tmp_path)
    assert "|  | stock |\n| --- | --: |\n| other attention | 30.0 |\n" in text and "`flashmoe bench profile`" in text
    assert "| `kernel<int>` | stock | exchange | 1 | 9.0 |" in text


def test_what_is_measured_logs_every_step_and_writes_no_checkpoint(tmp_path: Path) -> None:
    case = Case("deepseek_v3_16b_4gpu", 2, ("model.num_hidden_layers=13", "torchtitan.metrics.save_tb_folder=x"))
    found = recipe_as_measured(case, "stock", str(tmp_path))
    assert not found.checkpoint.model_fields_set and found.swap.moe == "stock" and found.folder == str(tmp_path)
    assert found.torchtitan["metrics"] == {"log_freq": 1, "save_tb_folder": "x"}
    given = recipe_as_measured(
        Case("quickstart", 1, ("checkpoint.start_from=there", "checkpoint.every=2")), "stock", ""
    )
    assert given.checkpoint.model_dump(exclude_unset=True) == {"start_from": "there"}


def test_cases_need_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "path_of_kernels", lambda device: "kernel")
    assert train.empty_row(Case("quickstart", 4), "cuda").skipped == {"*": "needs 4 GPUs, here are 2"}
    assert not train.empty_row(Case("quickstart", 2), "cuda").skipped


@pytest.mark.slow
def test_a_step_of_a_small_model(tmp_path: Path) -> None:
    assert run(Options("profile", device="cpu", json=tmp_path)) == 0
    (row,) = read(tmp_path / "profile_torchtitan.json").rows
    found = (row.model_extra or {})["profile"]
    assert set(found) == set(row.ms) == {"stock", "flashmoe"}
    for choice, about in found.items():
        exposed = sum(part["ms"] - part["hidden"] for part in about["parts"].values())
        assert exposed == pytest.approx(about["busy_ms"], rel=1e-2) and about["busy_ms"] < about["traced_ms"]
        assert ("our attention" in about["parts"]) == (choice == "flashmoe")
        assert about["parts"]["dense GEMM"]["ms"] > 0 and about["parts"]["exchange"]["launches"] >= 10
        assert about["waits"]["values read by the host"] > 0
