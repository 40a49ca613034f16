"""What is read of Nsight Compute's output, kept and shown; and what is said where it can't measure."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from flashmoe_train.bench import by_name, utilisation
from flashmoe_train.bench.kernel_names import short_name
from flashmoe_train.bench.measure import OperatorBench
from flashmoe_train.bench.results import here, read
from flashmoe_train.bench.utilisation import METRICS
from flashmoe_train.documents import documents
from flashmoe_train.errors import UsageError

HEADING = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
LIST = "flashmoe::<unnamed>::list_kernel(flashmoe::<unnamed>::Work, int, int, int)"
FORWARD = (
    "void flashmoe::<unnamed>::forward_kernel<flashmoe::<unnamed>::Sizes<__nv_bfloat16, (int)64, (int)64, (int)192, "
    "(int)128>>(flashmoe::<unnamed>::Work)"
)


def line(launch: int, kernel: str, metric: str, unit: str, value: str) -> str:
    where = ["python3.12", "127.0.0.1", kernel, "1", "7", "(512, 1, 1)", "(132, 1, 1)", "0", "9.0"]
    cells = [str(launch), "4321", *where, "Command line profiler metrics", metric, unit, value]
    return ",".join(f'"{cell}"' for cell in cells)


OUTPUT = "\n".join(
    [
        "==PROF== Connected to process 4321 (/usr/bin/python3.12)",
        '==PROF== Profiling "list_kernel" - 0: 0%....50%....100% - 11 passes',
        "==PROF== Disconnected from process 4321",
        HEADING,
        line(0, LIST, "gpu__time_duration.sum", "ns", "5,120"),
        line(0, LIST, "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "%", "0"),
        line(0, LIST, "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", "", "n/a"),
        line(1, FORWARD, "gpu__time_duration.sum", "ns", "4,333,824"),
        line(1, FORWARD, "launch__grid_size", "", "132"),
        line(1, FORWARD, "launch__shared_mem_per_block_dynamic", "byte/block", "230,400"),
        line(1, FORWARD, "sm__cycles_elapsed.avg.per_second", "hz", "1,620,345,678.9"),
        line(1, FORWARD, "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "%", "83.61"),
        line(1, FORWARD, "what__else.sum", "", "1"),
    ]
)


def test_launches_are_read_in_our_units() -> None:
    (list_name, listed), (name, found) = utilisation.kernels(OUTPUT)
    assert list_name == "list_kernel" and listed == {"us": 5.12, "tensor": 0}
    assert name == "forward_kernel<bf16, 64, 64, 192, 128>"
    assert set(found) == {"us", "blocks", "shared_kib", "ghz", "tensor"}
    assert [found[key] for key in ("blocks", "shared_kib", "tensor")] == [132, 225, 83.61]
    assert found["us"] == pytest.approx(4333.824) and found["ghz"] == pytest.approx(1.6203456789)
    assert utilisation.kernels("==PROF== Connected\n==WARNING== No kernels were profiled.\n") == []


@pytest.mark.parametrize("key, unit, wanted", [("us", "us", 8), ("us", "msecond", 8000), ("ghz", "Ghz", 8)])
def test_larger_units(key: str, unit: str, wanted: float) -> None:
    (metric,) = (metric for metric in METRICS if metric.key == key)
    assert metric.read("8.00", unit) == wanted


def test_unknown_unit_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"gpu__time_duration.sum in 'fortnight'; known are ns"):
        utilisation.kernels("\n".join([HEADING, line(0, LIST, "gpu__time_duration.sum", "fortnight", "1")]))


@pytest.mark.parametrize(
    "kernel, wanted",
    [
        ("triton_poi_fused_mul_silu_0", "triton_poi_fused_mul_silu_0"),
        (
            "void flashmoe::(anonymous namespace)::forward_kernel<flashmoe::(anonymous namespace)::Sizes<__half, 192, "
            "128, 128, 128> >(flashmoe::(anonymous namespace)::Work)",
            "forward_kernel<fp16, 192, 128, 128, 128>",
        ),
        (
            "void unnamed>::forward_kernel<unnamed>::Sizes<__nv_bfloat16, 64, 64, 192, 128>>(unnamed>::Work)",
            "forward_kernel<bf16, 64, 64, 192, 128>",
        ),
        ("void n::permute_kernel<unsigned int>(n::PermuteParams, unsigned int)", "permute_kernel<unsigned int>"),
        (
            "void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<c10::BFloat16>, "
            "std::array<char *, (unsigned long)1>>(int, T2, T3)",
            "vectorized_elementwise_kernel<4, FillFunctor, array>",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::copy<at::Op<float> >(at::It&)::{lambda(int)#1}, "
            "bool (*)(int)>(int, T3)",
            "elementwise_kernel<128, 4, copy, bool>",
        ),
        (
            "void cutlass::device_kernel<at::enable_3x<cutlass::Gemm<cutlass::Shape<int, int>, A, B, C, (bool)1, -1, "
            "D>>>(T1::Params)",
            "device_kernel<Shape, A, B, C, 1, -1, …>",
        ),
    ],
)
def test_names_are_short(kernel: str, wanted: str) -> None:
    assert short_name(kernel) == wanted


def test_cases_are_found_by_their_labels() -> None:
    for bench in by_name().values():
        if isinstance(bench, OperatorBench):
            labels = [case.label for case in (*bench.standard, *bench.tiny)]
            assert len(set(labels)) == len(labels)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(utilisation.app, arguments)


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, to be written, on a machine that looks as if it had a GPU."""
    path = tmp_path / "bin/ncu"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utilisation, "here", lambda name, line, _: here(name, line, torch.device("cpu")))
    return path


def write(program: Path, *lines: str) -> None:
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(0o755)


CASES = ("attention_forward", "--cases", "full d64 s[24]k b4 h8")


def test_table_in_terminal_file_and_document(ncu: Path, tmp_path: Path) -> None:
    (tmp_path / "output").write_text(OUTPUT)
    program = [
        '[ "$1" = --version ] && echo "Version 2025.3.1.0 (build 1)" && exit',
        f'echo "$@" >> {tmp_path}/calls',
        f"cat {tmp_path}/output",
    ]
    write(ncu, *program)
    result = command(*CASES, "--json", str(tmp_path / "docs/results/gpu"))
    assert result.exit_code == 0, result.output
    assert "forward_kernel<bf16, 64" in result.stdout and "4334" in result.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and calls[0].endswith("attention_forward --watched full d64 s2k b4 h8")
    assert all(metric.name in calls[0] for metric in METRICS)

    results = read(tmp_path / "docs/results/gpu/utilisation_attention_forward.json")
    assert results.bench == "utilisation_attention_forward" and results.versions["ncu"] == "2025.3.1.0"
    assert results.command == f"python -m flashmoe_train.bench.utilisation attention_forward --cases '{CASES[2]}'"
    assert [row.label for row in results.rows] == ["full d64 s2k b4 h8"] * 2 + ["full d64 s4k b4 h8"] * 2
    assert results.rows[0].case["s"] == 2048

    marker = "<!-- results: gpu/utilisation_attention_forward * s4k * -->\n<!-- end of table -->\n"
    (tmp_path / "README.md").write_text(marker)
    ((_, text),) = documents(tmp_path)
    _, heading, _, *lines = text.splitlines()
    # Of the other metrics nothing is known.
    assert heading == "| case | kernel | µs | GHz | tensor cores | shared KiB | blocks |"
    case, forward = "full d64 s4k b4 h8", "`forward_kernel<bf16, 64, 64, 192, 128>`"
    assert lines[0] == f"| {case} | `list_kernel` | 5.12 | – | 0 | – | – |"
    assert lines[1] == f"| {case} | {forward} | 4334 | 1.62 | 83.6 | 225 | 132 |"
    assert "ncu 2025.3.1.0" in text and utilisation.UNIT in text


@pytest.mark.parametrize(
    "program, text",
    [
        (["echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'", "exit 1"], "run as root"),
        (["echo 'error: out of luck' >&2", "exit 2"], "ended with 2: error: out of luck"),
        (["echo '==WARNING== No kernels were profiled.'"], "saw no kernel of attention_forward: full d64 s2k b4 h8"),
    ],
)
def test_failures(program: list[str], text: str, ncu: Path) -> None:
    write(ncu, '[ "$1" = --version ] && exit', *program)
    result = command(*CASES)
    assert result.exit_code == 2 and text in result.stderr and "Traceback" not in result.output


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*arguments: str) -> str:
        result = command(*arguments)
        assert result.exit_code == 2 and not result.stdout
        return result.stderr

    assert "did you mean 'attention_forward'" in refusal("attention_foward")
    assert "no bench of operators is called 'expert_parallel'" in refusal("expert_parallel")
    assert "no case matches '*nothing*'" in refusal("attention_forward", "--cases", "*nothing*")
    assert "must be a folder or end in .json" in refusal("attention_forward", "--json", "x.txt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no GPU" in refusal("attention_forward")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ncu is not on the PATH" in refusal("attention_forward")


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("ncu"), reason="needs Nsight Compute")
def test_a_case_on_gpu(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    result = command("attention_forward", "--cases", "full d64 s512 b1 h8 fp16", "--json", str(path))
    if "run as root" in result.stderr:
        pytest.skip("the driver lets administrators alone read the counters")
    assert result.exit_code == 0, result.output
    rows = read(path).rows
    assert rows
    for row in rows:
        values = (row.model_extra or {})["values"]
        assert set(values) == {metric.key for metric in METRICS}
        assert 0.5 < values["us"] < 1e4 and 0.1 < values["ghz"] < 3 and 0 < values["warps"] <= 100
