"""Variants of a kernel, built side by side and measured against each other and a library: for who works on csrc/.

    python -m flashmoe_train.bench.variants build attention_forward     # where nvcc is: registers, spills, notes
    python -m flashmoe_train.bench.variants run attention_forward       # where the GPU is: nothing is built there

A study says which kernel, which variants and how to judge them; it is a module of this folder or a file. `build` leaves
one folder of libraries, which may be carried to another machine. `run` checks every variant in a process of its own,
so that one which hangs or crashes costs itself alone, and times those that are right in turns with the library.

A variant that hangs runs once more, built with FLASHMOE_WATCHDOG: waits on barriers are bounded then, and say where
they waited (csrc/hopper/watchdog.cuh).
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from flashmoe_train.bench.measure import Case, Contender
from flashmoe_train.bench.timing import Run
from flashmoe_train.errors import UsageError, nearest

Launch = Callable[[ctypes.Structure], None]  # starts a variant's kernels on the current stream; raises RuntimeError


@dataclass(frozen=True)
class Variant:
    """How a build differs from the source as it stands: by macros, or by text that is replaced.

    Every text must be there exactly once: a source that has moved on breaks the build, not the meaning.
    """

    definitions: Mapping[str, str | int] = field(default_factory=dict)
    edits: Sequence[tuple[str, str]] = ()  # what stands in the source, what shall


@dataclass(frozen=True)
class Trial:
    """A case whose inputs are on the device."""

    run: Callable[[Launch], Run]  # what is checked and timed of a variant
    baselines: Mapping[str, Contender]  # the library first
    error: Callable[[Any], float]  # of what a run returns
    error_bound: float
    work: float  # FLOPs or bytes of one run


@dataclass(frozen=True, kw_only=True)
class Study:
    title: str
    source: str  # of the kernels, in csrc/
    function: str  # that launches them, in namespace flashmoe: cudaError_t (const Params&, cudaStream_t)
    params: type[ctypes.Structure]  # the same Params
    workspace: str = ""  # int64_t (const Params&): how many bytes `params.workspace` shall point to, of any content
    variants: Mapping[str, Variant]
    checks: Sequence[Case]  # each variant alone: small, of every kind
    cases: Sequence[Case]  # timed
    prepare: Callable[[Any, torch.device], Trial]
    rate: Literal["tflops", "gb_per_s"] = "tflops"


def studies() -> list[str]:
    """The modules of this folder that are one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nSTUDY = " in path.read_text())


def load(name: str) -> tuple[str, Study]:
    """A study and what it is called, by the name of a module here or the path of a file."""
    if name.endswith(".py"):
        path = Path(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UsageError(f"there is no study {name}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return path.stem, module.STUDY
    if name not in studies():
        raise UsageError(f"no study is called {name!r}; {nearest(name, studies(), 'there are ')}")
    return name, importlib.import_module(f"{__name__}.{name}").STUDY
