"""Builds a study's variants and reads what the compiler says of them."""

import re
import shlex
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydantic
from pydantic import BaseModel

from flashmoe_train.bench.results import commit
from flashmoe_train.bench.variants import Study, Variant
from flashmoe_train.bench.variants.compiler import Kernel, find_nvcc, machine_code, readings
from flashmoe_train.errors import UsageError

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"
# As csrc/CMakeLists.txt has them; -s: symbols for a debugger are a third of a library.
OPTIONS = (
    "-shared", "-O3", "-std=c++20", "-Xcompiler=-fPIC", "-gencode=arch=compute_90a,code=sm_90a", "-cudart=static",
    "--resource-usage", "-Xlinker=-s",
)  # fmt: skip

# Around the kernel's source: its launch function under names that ctypes finds.
_DRIVER = """\
#include <cstdint>
#include <exception>
#include <string>
#include "{source}"
#ifdef FLASHMOE_WATCHDOG
#include "hopper/watchdog.cuh"
#endif

namespace {{
template <typename Params>
struct Launcher {{
  cudaError_t (*function)(const Params&, cudaStream_t);
  static constexpr size_t size = sizeof(Params);
  cudaError_t operator()(const void* params, void* stream) const {{
    return function(*static_cast<const Params*>(params), static_cast<cudaStream_t>(stream));
  }}
}};
template <typename Params>
Launcher(cudaError_t (*)(const Params&, cudaStream_t)) -> Launcher<Params>;
const Launcher launcher{{flashmoe::{function}}};

template <typename Params>
int64_t bytes(int64_t (*function)(const Params&), const void* params) {{
  return function(*static_cast<const Params*>(params));
}}
}}  // namespace

extern "C" size_t params_size() {{ return launcher.size; }}

// What went wrong, or null.
extern "C" const char* launch(const void* params, void* stream) {{
  static std::string text;
  try {{
    const cudaError_t error = launcher(params, stream);
    if (error == cudaSuccess) return nullptr;
    text = cudaGetErrorString(error);
  }} catch (const std::exception& error) {{
    text = error.what();
  }}
  return text.c_str();
}}
{workspace}
#ifdef FLASHMOE_WATCHDOG
extern "C" int watchdog_records() {{ return flashmoe::hopper::HANGS; }}
extern "C" const void* watchdog() {{ return flashmoe::hopper::watchdog(); }}
#endif
"""
_WORKSPACE = """\
extern "C" int64_t workspace_bytes(const void* params) {{ return bytes(flashmoe::{workspace}, params); }}
"""


class Built(BaseModel):
    """One variant."""

    definitions: dict[str, str] = {}
    edits: list[tuple[str, str]] = []
    kernels: list[Kernel] = []
    notes: list[str] = []  # ptxas on register budgets that it ignored, wgmma that it serialised
    hgmma: int | None = None  # instructions; None without a disassembler
    seconds: float = 0.0  # of compilation
    failed: str = ""

    @property
    def registers(self) -> str:
        return "/".join(str(kernel.registers) for kernel in self.kernels)

    @property
    def spilled(self) -> int:
        return sum(kernel.spilled for kernel in self.kernels)

    @property
    def short_notes(self) -> str:
        return " ".join(dict.fromkeys(note[:5] for note in self.notes))


class Build(BaseModel):
    """A folder of variants, as its index says."""

    study: str
    commit: str
    variants: dict[str, Built] = {}

    def write(self, folder: Path) -> None:
        (folder / "variants.json").write_text(self.model_dump_json(indent=1) + "\n")


def read(folder: Path) -> Build:
    try:
        return Build.model_validate_json((folder / "variants.json").read_bytes())
    except OSError:
        raise UsageError(f"{folder} holds no variants: build them first") from None
    except pydantic.ValidationError as error:
        raise UsageError(f"{folder / 'variants.json'} is not what `build` writes: {error}") from None


def library(folder: Path, variant: str, watchdog: bool = False) -> Path:
    return folder / f"{variant}{'.watchdog' * watchdog}.so"


def build(name: str, study: Study, variants: Mapping[str, Variant], folder: Path, jobs: int) -> Build:
    """All of `variants`, with and without the watchdog; a variant that does not compile says so in its place."""
    if not CSRC.is_dir():
        raise UsageError(f"kernels are built from a checkout: there is no {CSRC}")
    compiler, result = find_nvcc(), Build(study=name, commit=commit())
    folder = folder.resolve()  # sources are included by their paths
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.so"):
        stale.unlink()

    def one(variant: str) -> Built:
        return _build(compiler, study, variant, variants[variant], folder)

    with ThreadPoolExecutor(jobs) as pool:
        result.variants = dict(zip(variants, pool.map(one, variants), strict=True))
    result.write(folder)
    return result


def _build(compiler: str, study: Study, name: str, variant: Variant, folder: Path) -> Built:
    definitions = {key: str(value) for key, value in variant.definitions.items()}
    built = Built(definitions=definitions, edits=list(variant.edits))
    source = CSRC / study.source
    try:
        if variant.edits:
            source = folder / f"{name}.source.cu"
            source.write_text(edited((CSRC / study.source).read_text(), variant))
        driver = folder / f"{name}.cu"
        workspace = _WORKSPACE.format(workspace=study.workspace) if study.workspace else ""
        driver.write_text(_DRIVER.format(source=source, function=study.function, workspace=workspace))
        begin = time.perf_counter()
        log = _compile(compiler, driver, definitions, library(folder, name))
        built.seconds = round(time.perf_counter() - begin, 1)
        built.kernels, built.notes = readings(log)
        code = machine_code(library(folder, name))
        built.hgmma = None if code is None else sum(len(re.findall(r"\bHGMMA\b", one)) for one in code.values())
        _compile(compiler, driver, definitions | {"FLASHMOE_WATCHDOG": "1"}, library(folder, name, watchdog=True))
    except CompileError as error:
        built.failed = str(error)
    return built


class CompileError(Exception):
    pass


def edited(text: str, variant: Variant) -> str:
    for old, new in variant.edits:
        if (count := text.count(old)) != 1:
            raise CompileError(f"the source has {count} of {old!r}, which is to be replaced")
        text = text.replace(old, new)
    return text


def _compile(compiler: str, source: Path, definitions: Mapping[str, str], target: Path) -> str:
    macros = [f"-D{key}={value}" for key, value in definitions.items()]
    command = [compiler, *OPTIONS, f"-I{CSRC}", *macros, str(source), "-o", str(target)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    target.with_suffix(".log").write_text(f"{shlex.join(command)}\n{done.stdout}")
    if done.returncode:
        first = re.search(r"\berror\b.*", done.stdout)
        raise CompileError(first[0] if first else f"nvcc ended with {done.returncode}")
    return done.stdout
