"""`flashmoe bench` from end to end on tiny cases: what it prints, writes and refuses, and how it ends."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from flashmoe_train.bench import SUBJECTS, Options, attention, attention_cases, expert_parallel, run
from flashmoe_train.bench.results import FLOORS, Results, read
from flashmoe_train.cli import app


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def check_results(path: Path, command: str) -> Results:
    content = json.loads(path.read_text())
    assert list(content) == (
        ["bench", "gpu", "gpus", "torch", "driver", "commit", "date", "command", "versions", "skipped", "rows"]
    )
    assert content["bench"] == path.stem and content["command"] == command
    assert content["torch"] == content["versions"]["torch"] == torch.__version__
    results = read(path)
    assert results.rows
    for row in results.rows:
        assert not row.failed
        # Our result was checked; what is timed is what was checked, and has a rate.
        assert 0 <= row.error["flashmoe"] < 1e-2 and set(row.error) == set(row.ms) - set(FLOORS)
        assert set(row.ms) == set(row.tflops or row.gb_per_s) and min(row.ms.values()) > 0
        assert row.flashmoe_path == "reference"
    assert any(row.baselines for row in results.rows)
    return results


@pytest.mark.parametrize(
    "subject, baselines",
    [
        (
            "attention",
            {
                "attention_forward": {"sdpa_flash"},
                "attention_backward": {"sdpa_flash", "flashmoe_deterministic"},
                "attention_forward_backward": {"sdpa_flash", "flashmoe_deterministic"},
            },
        ),
        (
            "moe",
            {
                "moe_forward": {"grouped", "loop", "gemm_floor"},
                "moe_forward_backward": {"grouped", "loop", "gemm_floor"},
                "moe_parts": {"eager", "torch_sort", "gather", "index_add", "copy"},
            },
        ),
        ("transformers", {"moe_transformers": {"grouped_mm", "eager_loop"}}),
    ],
)
def test_tiny_cases(subject: str, baselines: dict[str, set[str]], tmp_path: Path) -> None:
    result = bench(subject, "--device", "cpu", "--json", str(tmp_path), "--plot", str(tmp_path))
    assert result.exit_code == 0, result.output
    command = f"flashmoe bench {subject} --device cpu"
    assert {path.stem for path in tmp_path.glob("*.json")} == set(baselines)
    for name, wanted in baselines.items():
        results = check_results(tmp_path / f"{name}.json", command)
        assert {x for row in results.rows for x in row.ms} == wanted | {"flashmoe"}
        for row in results.rows:
            assert row.label in result.stdout
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for text in ("× best baseline", "geometric mean of", "not installed"):
        assert text in result.stdout


def test_one_bench_to_files(tmp_path: Path) -> None:
    files = tmp_path / "deep/parts.json", tmp_path / "other/parts.png"
    result = bench("moe-parts", "--device=cpu", "--json", str(files[0]), "--plot", str(files[1]))
    assert result.exit_code == 0, result.output
    results = read(files[0])
    assert [row.case["op"] for row in results.rows] == [
        "router_topk", "router_topk_backward", "route_plan", "moe_permute", "moe_glu", "moe_glu_backward",
        "moe_combine", "moe_combine_unweighted", "moe_combine_backward",
    ]  # fmt: skip
    assert set(results.rows[0].case) == {"op", "T", "d", "E", "K"}
    assert files[1].exists()


@pytest.mark.parametrize("subject", ["expert-parallel", pytest.param("train", marks=pytest.mark.slow)])
def test_processes_of_their_own(subject: str, tmp_path: Path) -> None:
    result = bench(subject, "--device=cpu", "--json", str(tmp_path), "--plot", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = sorted(tmp_path.glob("*.json"))
    if subject == "train":
        assert [path.stem for path in found] == ["train_megatron", "train_torchtitan"]
        for path in found:
            (row,) = read(path).rows
            assert set(row.ms) == set(row.tokens_per_s_per_gpu) == {"stock", "flashmoe"}
            stock, ours = (json.loads(path.read_text())["rows"][0]["loss"][name] for name in ("stock", "flashmoe"))
            assert len(stock) == 8 and max(abs(a - b) for a, b in zip(stock, ours, strict=True)) < 1e-2
    else:
        rows = read(*found).rows
        assert [row.case["op"] for row in rows] == ["dispatch", "combine", "layer_forward_backward"]
        assert all(not row.failed and row.error["all_to_all"] < 3e-5 for row in rows)
        assert rows[0].error["all_to_all"] == 0 and "no_exchange" in rows[2].ms


def test_processes_that_fail_are_a_failed_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parallel, "LIMIT", 0.01)
    result = bench("expert-parallel", "--device=cpu", "--json", str(tmp_path))
    assert result.exit_code == 1
    rows = read(tmp_path / "expert_parallel.json").rows
    assert len(rows) == 3 and all("did not end within" in row.failed["*"] for row in rows)


def test_recipe_to_train_is_looked_for_first(tmp_path: Path) -> None:
    result = bench("train", "--device=cpu", "--cases", "quickstrat")
    assert result.exit_code == 2 and "did you mean 'quickstart'" in result.stderr


# ------------------------------------------------------------------------------------------------------------ the gate


def gate(tmp_path: Path, change: Callable[[Results], None]) -> Result:
    """Runs moe_parts against its own results after `change`."""
    path = tmp_path / "moe_parts.json"
    assert bench("moe_parts", "--device=cpu", "--json", str(path)).exit_code == 0
    stored = read(path)
    change(stored)
    stored.write(path)
    return bench("moe_parts", "--device=cpu", "--against", str(path))


def ours(factor: float) -> Callable[[Results], None]:
    def change(results: Results) -> None:
        for row in results.rows:
            row.ms["flashmoe"] *= factor

    return change


def test_gate_passes_where_nothing_is_worse(tmp_path: Path) -> None:
    result = gate(tmp_path, ours(1000))
    assert result.exit_code == 0, result.output
    assert "9 cases compared" in result.stdout and "0 worse" in result.stdout


def test_gate_fails_where_it_was_better(tmp_path: Path) -> None:
    result = gate(tmp_path, ours(0.001))
    assert result.exit_code == 1
    assert result.stdout.count("WORSE: moe_parts: ") == 9 and "9 worse" in result.stdout


def test_gate_refuses_to_compare_nothing(tmp_path: Path) -> None:
    def other_cases(results: Results) -> None:
        for row in results.rows:
            row.case["T"] += 1

    result = gate(tmp_path, other_cases)
    assert result.exit_code == 2 and "could be compared" in result.stderr


def test_gate_finds_files_of_this_machine(tmp_path: Path) -> None:
    for machine in ("here", "there"):
        path = tmp_path / machine / "moe_parts.json"
        assert bench("moe_parts", "--device=cpu", "--json", str(path)).exit_code == 0
        stored = read(path)
        ours(1000 if machine == "here" else 0.001)(stored)
        stored.gpu = stored.gpu if machine == "here" else "another"
        stored.write(path)
    assert bench("moe_parts", "--device=cpu", "--against", str(tmp_path)).exit_code == 0
    stored = read(tmp_path / "there/moe_parts.json")
    stored.gpu = read(tmp_path / "here/moe_parts.json").gpu
    stored.write(tmp_path / "there/moe_parts.json")
    result = bench("moe_parts", "--device=cpu", "--against", str(tmp_path))
    assert result.exit_code == 2 and "which of these" in result.stderr


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("attentoin",), "did you mean 'attention'"),
        (("moe-partz",), "did you mean 'moe_parts'"),
        (("xyz",), "there are attention, moe, expert-parallel, transformers, train, profile, attention"),
        (("attention", "--cases", "*nothing*"), "full d64 s1k b16 h32"),
        (("moe", "--json", "x.json"), "one file for 3 benches"),
        (("moe", "--plot", "x.png"), "one file for 3 benches"),
        (("moe_parts", "--json", "x.txt"), "must be a folder or end in .json"),
        (("moe_parts", "--against", "missing.json"), "cannot read missing.json"),
        (("moe_parts", "--against", "empty"), "holds none of moe_parts.json"),
        (("moe_parts", "--against", "wrong.json"), "wrong.json is no results file of `flashmoe bench`: gpu"),
        (("moe_parts", "--against", "other.json"), "results of attention_forward, which this run does not measure"),
        (("moe_parts", "--device", "tpu"), "--device must be cuda or cpu"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.json").write_text('{"bench": "moe_parts"}')
    about = dict.fromkeys(("gpu", "torch", "driver", "commit", "date", "command"), "")
    Results(bench="attention_forward", gpus=0, **about).write(tmp_path / "other.json")
    result = bench(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and text in result.stderr
    assert "Traceback" not in result.output and not result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu_for_cuda() -> None:
    result = bench("attention", "--device=cuda")
    assert result.exit_code == 2 and "PyTorch sees no GPU" in result.stderr


def test_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench("moe_parts", "--device=cpu", "--plot", str(tmp_path))
    assert result.exit_code == 2 and "pip install matplotlib" in result.stderr


def test_pattern_selects_standard_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forward, *_ = attention.BENCHES
    small = [
        attention_cases.Case(1, 16, 2, 8, True),
        attention_cases.Case(1, 16, 2, 8, False),
        attention_cases.Case(1, 20, 2, 8, True),
    ]
    monkeypatch.setitem(SUBJECTS, "attention", (replace(forward, standard=small),))
    path = tmp_path / "results.json"
    assert bench("attention", "--device=cpu", "--cases", "*CAUSAL*", "--json", str(path)).exit_code == 0
    assert [row.label for row in read(path).rows] == ["causal d8 s16 b1 h2", "causal d8 s20 b1 h2"]


def test_library_imports_without_bench() -> None:
    program = (
        "import sys, flashmoe_train.cli, flashmoe_train.nn, flashmoe_train.ops.expert_parallel\n"
        "print([name for name in sys.modules if name.startswith('flashmoe_train.bench')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("subject", SUBJECTS)
def test_tiny_cases_on_gpu(subject: str, tmp_path: Path) -> None:
    assert run(Options(subject, cases="tiny", json=tmp_path, device="cuda")) == 0
    for one in SUBJECTS[subject]:
        results = read(tmp_path / f"{one.name}.json")
        assert results.gpus >= 1 and results.gpu
        for row in results.rows:
            if "*" in row.skipped:
                assert subject == "expert-parallel" and "GPUs, here are" in row.skipped["*"]
            else:
                assert row.ms["flashmoe"] > 0
