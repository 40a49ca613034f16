"""Variants of a kernel: what is read of a build, and that one which hangs, crashes or is wrong costs itself alone."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe_train.bench.results import Row, here, read
from flashmoe_train.bench.variants import Variant, build, load, studies
from flashmoe_train.bench.variants.build import Build, Built, CompileError
from flashmoe_train.bench.variants.compiler import Kernel, readings
from flashmoe_train.bench.variants.run import Measured, Outcome
from flashmoe_train.documents import documents
from flashmoe_train.errors import UsageError
from flashmoe_train.ops.attention.reference import reference_backward, reference_forward

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_nvcc = pytest.mark.skipif(not shutil.which(os.environ.get("CUDACXX", "nvcc")), reason="needs nvcc")

LOG = """\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to registers
ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function '_Z7forward4Work' for 'sm_90a'
ptxas info    : Function properties for _Z7forward4Work
    72 bytes stack frame, 60 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 72 bytes cumulative stack size
ptxas info    : Compile time = 259.335 ms
ptxas info    : Compiling entry function '_Z5clear4Work' for 'sm_90a'
ptxas info    : Function properties for _Z5clear4Work
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""

# A kernel for the CPU: twice x, but for what MODE says.
SOURCE = """\
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
struct Params { const float* x; float* out; int64_t count; };
extern "C" size_t params_size() { return sizeof(Params); }
extern "C" const char* launch(const Params* p, void*) {
#if MODE == 1
  std::fprintf(stderr, "it breaks\\n"), std::abort();
#elif MODE == 2
  for (;;) sleep(1);
#elif MODE == 3
  return "x is not what it should be";
#endif
  static int launches = 0;
  ++launches;
  if (MODE == 5 && launches > 1) return nullptr;
  if (MODE == 6 && p->count > 150) return "x is too large";
  for (; MODE == 7 && p->count > 50;) sleep(1);
  for (int64_t i = 0; i < p->count; ++i) p->out[i] = p->x[i] * (MODE == 4 && i == 7 ? 3 : 2);
  return nullptr;
}
#ifdef WATCHDOG
static uint32_t records[4][8] = {
    {}, {1, 5, 0, 0, 128, 0x3010, 1, 0}, {1, 2, 1, 0, 0, 0x3020, 0, 0}, {1, 5, 0, 0, 160, 0x3010, 1, 0}};
extern "C" int watchdog_records() { return 4; }
extern "C" const void* watchdog() { return records; }
#endif
"""

STUDY = """\
import ctypes
from dataclasses import dataclass
import torch
from flashmoe_train.bench.measure import relative_error
from flashmoe_train.bench.variants import Study, Trial, Variant

class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_int64)]

@dataclass(frozen=True)
class Case:
    count: int
    @property
    def label(self):
        return f"{self.count} numbers"
    def as_json(self):
        return {"count": self.count}

def prepare(case, device):
    x = torch.randn(case.count)
    def run(launch):
        out = torch.full_like(x, torch.nan)
        def once():
            launch(Params(x.data_ptr(), out.data_ptr(), case.count))
            return out
        return once
    return Trial(run, {"torch": lambda: lambda: x * 2}, lambda y: relative_error(y, x.double() * 2), 1e-6, 8e6)

STUDY = Study(
    title="Twice", source="twice.cu", function="twice", params=Params,
    variants={name: Variant() for name in ("right", "crash", "hang", "refuse", "wrong", "once", "small", "short")},
    checks=[Case(3), Case(9)], cases=[Case(100), Case(200)], prepare=prepare, rate="gb_per_s",
)
"""


def test_readings_of_a_build() -> None:
    kernels, notes = readings(LOG)
    assert kernels == [
        Kernel(name="_Z7forward4Work", architecture="sm_90a", registers=168, stack=72, spilled=128),
        Kernel(name="_Z5clear4Work", architecture="sm_90a", registers=16, stack=0, spilled=0),
    ]
    (note,) = notes
    assert note.startswith("C7512") and "serialized" in note
    built = Built(kernels=kernels)
    assert (built.registers, built.spilled) == ("168/16", 128)


def test_text_to_replace_is_there_once() -> None:
    variant = Variant(edits=[("STAGES = 2", "STAGES = 3"), ("KEYS", "ROWS")])
    assert build.edited("STAGES = 2; KEYS", variant) == "STAGES = 3; ROWS"
    for text, count in (("STAGES = 4; KEYS", 0), ("STAGES = 2; STAGES = 2; KEYS", 2)):
        with pytest.raises(CompileError, match=f"has {count} of 'STAGES = 2'"):
            build.edited(text, variant)


@pytest.mark.parametrize("name", studies())
def test_edits_fit_their_source(name: str) -> None:
    _, study = load(name)
    text = (build.CSRC / study.source).read_text()
    for variant in study.variants.values():
        assert build.edited(text, variant) != text or not variant.edits


def test_studies_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    assert load("attention_forward")[1].function == "attention_forward"
    (tmp_path / "twice.py").write_text(STUDY)
    name, study = load(str(tmp_path / "twice.py"))
    assert (name, study.title) == ("twice", "Twice")
    with pytest.raises(UsageError, match="did you mean 'attention_forward'"):
        load("attention_forwards")
    with pytest.raises(UsageError, match=r"no study .*other\.py"):
        load(str(tmp_path / "other.py"))
    with pytest.raises(UsageError, match="build them first"):
        build.read(tmp_path)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "flashmoe_train.bench.variants", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_each_variant_stands_alone(tmp_path: Path) -> None:
    """As on a GPU, with libraries for the CPU in the place of what nvcc makes."""
    (tmp_path / "twice.py").write_text(STUDY)
    (tmp_path / "twice.cpp").write_text(SOURCE)
    folder = tmp_path / "built/twice"
    folder.mkdir(parents=True)
    index = Build(study="twice", commit="abc1234")
    modes = {"right": 0, "crash": 1, "hang": 2, "refuse": 3, "wrong": 4, "once": 5, "small": 6, "short": 7}
    for name, mode in modes.items():
        index.variants[name] = Built(definitions={"MODE": str(mode)}, kernels=readings(LOG)[0], hgmma=32)
        for watchdog, mode_here in ((False, mode), *([(True, 0)] if name == "hang" else [])):
            options = [f"-DMODE={mode_here}", *["-DWATCHDOG"] * watchdog]
            target = build.library(folder, name, watchdog)
            line = [COMPILER, "-shared", "-fPIC", *options, str(tmp_path / "twice.cpp"), "-o", str(target)]
            subprocess.run(line, check=True)
    index.variants["unfinished"] = Built(failed="error: expected a ;")
    index.write(folder)

    study, out = str(tmp_path / "twice.py"), tmp_path / "twice.json"
    options = ["--folder", str(tmp_path / "built"), "--device", "cpu", "--limit", "2", "--json", str(out)]
    done = command("run", study, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    written = json.loads(out.read_text())
    problems = {name: variant["problem"] for name, variant in written["variants"].items()}
    assert problems.pop("right") == ""
    assert problems.pop("unfinished") == "error: expected a ;"
    assert problems.pop("crash") == "3 numbers: its process ended with -6: it breaks"
    assert problems.pop("refuse") == "3 numbers: RuntimeError: x is not what it should be"
    assert problems.pop("wrong").startswith("9 numbers: relative error")
    assert problems.pop("once") == "3 numbers: relative error nan, allowed 1e-06"  # the second time it writes nothing
    assert problems.pop("small") == "200 numbers: RuntimeError: x is too large"  # in what is timed alone
    assert problems.pop("short") == "100 numbers: no end after 2 s"
    assert problems.pop("hang") == (
        "3 numbers: no end after 2 s; watchdog: block 2,1,0 thread 0 at barrier 0x3020 parity 0; "
        "block 5 thread 128 and 1 more warps at barrier 0x3010 parity 1"
    )
    assert not problems
    # What is right was timed beside the library.
    results = read(out)
    assert (results.bench, results.commit) == ("variants_twice", "abc1234")
    assert [row.label for row in results.rows] == ["100 numbers", "200 numbers"]
    assert [set(row.ms) for row in results.rows] == [{"right", "small", "torch"}, {"right", "torch"}]
    assert all(set(row.ms) == set(row.gb_per_s) and not row.failed for row in results.rows)
    for text in ("168/16", "GB/s", " torch", "block 5 thread 128", "it breaks", "32"):
        assert text in done.stdout
    assert "TFLOP/s" not in done.stdout

    done = command("run", study, *options, "--only", "right", "--cases", "200*")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row.label for row in read(out).rows] == ["200 numbers"]
    assert read(out).command.endswith("twice.py --only right --cases '200*'")
    done = command("run", study, *options, "--only", "rihgt")
    assert done.returncode == 2 and "there are right, crash" in done.stderr
    done = command("run", study, *options, "--cases", "300*")
    assert done.returncode == 2 and "there are 100 numbers, 200 numbers" in done.stderr


def test_table_for_documents(tmp_path: Path) -> None:
    """A line for every variant, a column for every case; what failed has no line."""
    about = here("variants_twice", "python -m flashmoe_train.bench.variants run twice", torch.device("cpu"))
    measured = Measured(
        **about.model_dump(), variants={"one": Outcome(), "two": Outcome(), "bad": Outcome(problem="x")}
    )
    for label, two in (("full a", 0.5), ("causal b", 2.0)):
        ms = {"one": 1.0, "two": two, "library": 1.5}
        rates = {name: 1000 / x for name, x in ms.items()}
        measured.rows.append(Row(case={"label": label}, label=label, ms=ms, tflops=rates))
    measured.write(tmp_path / "docs/results/gpu/variants_twice.json")
    (tmp_path / "README.md").write_text("<!-- results: gpu/variants_twice * -->\n<!-- end of table -->\n")
    ((_, text),) = documents(tmp_path)
    lines = text.splitlines()
    assert lines[1:6] == [
        "| variant | full a | causal b |",
        "| --- | --: | --: |",
        "| one | 1000 (1.500) | 1000 (1.500) |",
        "| two | 2000 (3.000) | 500 (0.750) |",
        "| library | 667 | 667 |",
    ]
    assert lines[7].startswith("TFLOP/s (× the library); ")


# ------------------------------------------------------------------------------------------------------------- kernels


def tensor(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What is there in memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def operand(p: Any, name: str, rows: int = 0) -> torch.Tensor:
    """A tensor with strides of its own, by what Params say of it."""
    strides = *(getattr(getattr(p, f"{name}_strides"), d) for d in ("batch", "row", "head")), 1
    rows = rows or (p.keys if name in "kv" else p.queries)
    shape = p.batch, rows, p.kv_heads if name in "kv" else p.heads, p.dim if name in "qk" else p.dim_v
    return tensor(getattr(p, name), shape, strides, torch.bfloat16)


@pytest.mark.parametrize("wrong", ["", "one element of out", "one element of lse", "a row beyond out"])
@pytest.mark.parametrize("number", range(6, 18))
def test_check_of_attention_forward(number: int, wrong: str) -> None:
    """With a launch that computes on the CPU from what it finds in Params. What is wrong with it is seen."""
    _, study = load("attention_forward")
    case = study.checks[number]

    def launch(p: Any) -> None:
        q, k, v = (operand(p, name) for name in "qkv")
        out = operand(p, "out", p.queries + 1)
        shape = (p.batch, p.heads, p.queries)
        lse = tensor(p.lse, shape, (shape[1] * shape[2], shape[2], 1), torch.float32)
        mask = (p.scale, p.left, p.right, None, None, True)
        out[:, :-1], lse[:] = reference_forward(q.float(), k.float(), v.float(), *mask)
        if wrong == "one element of out":
            out[0, 0, 0, 5] += 0.3
        elif wrong == "one element of lse":
            lse[0, 0, -1] += 0.01
        elif wrong:
            out[0, -1, 0, 5] = 0

    trial = study.prepare(case, torch.device("cpu"))
    error = trial.error(trial.run(launch)())
    assert (error <= trial.error_bound) == (not wrong), (case.label, error)


@pytest.mark.parametrize("wrong", ["", "one element of dq", "one element of dv", "an element beyond dk"])
@pytest.mark.parametrize("number", range(6, 17))
def test_check_of_attention_backward(number: int, wrong: str) -> None:
    """As of forward; every check comes once more, deterministic."""
    _, study = load("attention_backward")
    half = len(study.checks) // 2
    case = study.checks[number + half * (number % 2)]
    assert study.checks[number + half].label == f"{study.checks[number].label} deterministic"

    def launch(p: Any) -> None:
        assert p.deterministic == case.label.endswith("deterministic")
        q, k, v, out, dout = (operand(p, name).float() for name in ("q", "k", "v", "out", "dout"))
        lse = tensor(p.lse, (p.batch, p.heads, p.queries), (p.heads * p.queries, p.queries, 1), torch.float32)
        found = reference_backward(dout, q, k, v, out, lse, p.scale, p.left, p.right, None, None, True)
        for name, x in zip(("dq", "dk", "dv"), found, strict=True):
            flat = tensor(getattr(p, name), (x.numel() + 1,), (1,), torch.bfloat16)
            flat[:-1] = x.flatten()
            if wrong == f"one element of {name}":
                flat[5] += 0.3
            elif wrong == f"an element beyond {name}":
                flat[-1] = 0

    trial = study.prepare(case, torch.device("cpu"))
    error = trial.error(trial.run(launch)())
    assert (error <= trial.error_bound) == (not wrong), (case.label, error)


@needs_nvcc
@pytest.mark.slow
def test_attention_forward_as_it_stands(tmp_path: Path) -> None:
    """No spill, no note of ptxas, all products on the tensor cores; a missing fence would be noted."""
    name, study = load("attention_forward")
    twice = "      wgmma_fence();\n      multiply_values"
    alone = {"FORWARD_DIM": 128}
    variants = {"plain": Variant(alone), "unfenced": Variant(alone, [(twice, "      multiply_values")])}
    built = build.build(name, study, variants, tmp_path, jobs=2).variants
    assert not built["plain"].failed and not built["plain"].notes
    assert len(built["plain"].kernels) == 3  # of large tiles and of small ones; the third lists the tiles of documents
    assert not any(kernel.spilled or kernel.stack for kernel in built["plain"].kernels)
    # First scores, of the first tile and the next; scores and values of a step, with and without a mask; last values.
    assert built["plain"].hgmma in (None, 2 * 7 * 8)
    assert [note[:5] for note in built["unfenced"].notes] == ["C7519"] * len(built["unfenced"].notes) != []


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.slow
def test_deadlock_is_reported(tmp_path: Path) -> None:
    """The watchdog says who waits for what; who does not hang is measured all the same."""
    _, study = load("attention_forward")
    variants = {name: study.variants[name] for name in ("now", "deadlock")}
    build.build("attention_forward", study, variants, tmp_path / "attention_forward", jobs=2)
    out = tmp_path / "out.json"
    case = study.cases[0].label
    options = ["--folder", str(tmp_path), "--json", str(out), "--cases", case, "--limit", "3"]
    done = command("run", "attention_forward", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    problems = {name: variant["problem"] for name, variant in json.loads(out.read_text())["variants"].items()}
    assert problems["now"] == ""
    assert "no end after 3 s; watchdog: block 0 thread 0 and " in problems["deadlock"]
    (row,) = read(out).rows
    assert "now" in row.ms and torch.cuda.get_device_name() == read(out).gpu
