"""`flashmoe doctor`: what this machine has, what runs on it, and what to do about what does not."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashmoe_train import support, versions
from flashmoe_train.ops.attention.checks import TMA_BYTES
from flashmoe_train.ops.library import COMPILED, CUDA_LIBRARY, HOPPER, capability, runs

State = Literal["ok", "note", "problem"]


class Finding(NamedTuple):
    state: State
    subject: str
    text: str


def examine() -> list[Finding]:
    """Looks at this machine. A "problem" keeps `flashmoe train` from starting; a "note" costs speed."""
    return [*_software(), *_gpus(), *_library(), *_frameworks(), *_operators()]


def report(console: Console) -> bool:
    """Prints the findings; whether there is no problem among them."""
    table = Table.grid(padding=(0, 2))
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    findings = examine()
    for state, subject, text in findings:
        table.add_row(f"[{colours[state]}]{state}[/]", subject, escape(text))
    console.print(table, highlight=False)
    return all(finding.state != "problem" for finding in findings)


def _software() -> Iterator[Finding]:
    yield Finding("ok", "Python", platform.python_version())
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("ok", "PyTorch", f"{torch.__version__}, {cuda}")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "CUDA finds none"
        yield Finding("note", "GPU", f"none ({why}): everything runs on reference kernels, in float32")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        name = f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        if found.major == 9:
            yield Finding("ok", f"GPU {i}", name)
        else:
            yield Finding("note", f"GPU {i}", f"{name}: the Hopper kernels need sm_90; PyTorch's run instead")


def _library() -> Iterator[Finding]:
    if CUDA_LIBRARY.exists():
        loaded = "loaded" if torch.version.cuda else "not loaded: this PyTorch could not use it"
        yield Finding("ok", "CUDA library", f"{CUDA_LIBRARY} ({loaded}), with {', '.join(sorted(COMPILED))}")
        return
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    do = "reinstall flashmoe_train to build it" if nvcc else "install a CUDA toolkit (nvcc on PATH) and reinstall"
    yield Finding("note", "CUDA library", f"{CUDA_LIBRARY} is not there: {do}")


def _frameworks() -> Iterator[Finding]:
    # "megatron-core" is imported as megatron, and that is what our extra for it is called.
    frameworks = {entry["framework"]: entry["framework"].removesuffix("-core") for entry in versions.tested()}
    missing = [name for name in frameworks.values() if importlib.util.find_spec(name) is None]
    for framework, name in frameworks.items():
        tested = ", ".join(f"{e['version']} with torch {e['torch']}" for e in versions.tested(framework))
        if name in missing:
            do = f"pip install 'flashmoe-train[{name}]'"
            state: State = "problem" if len(missing) == len(frameworks) else "note"  # one is enough
            yield Finding(state, framework, f"not installed: {do} (tested: {tested})")
            continue
        version, torch_version = importlib.metadata.version(framework), Version(torch.__version__)
        pair = f"{version} with torch {torch_version.major}.{torch_version.minor}"
        torches = [Version(e["torch"]) for e in versions.tested(framework) if e["version"] == version]
        if any(torch_version.release[:2] == one.release[:2] for one in torches):
            yield Finding("ok", framework, f"{pair}: tested")
        elif torches and torch_version < min(torches):
            yield Finding("problem", framework, f"{version} needs torch {min(torches)} or later (tested: {tested})")
        elif torches:
            yield Finding(
                "note", framework, f"{version} is not tested with torch {torch.__version__} (tested: {tested})"
            )
        else:
            yield Finding("problem", framework, f"{version} is not supported (tested: {tested})")
        for entry in versions.broken(framework, torch_version, version):
            what = " + ".join(entry["features"])
            yield Finding("note", framework, f"{what} is refused: {entry['why']}. {entry['instead']}")


# Tests hold the integrations to it.
_LAYOUTS = (
    "[b, s, h, d], [b, h, s, d] and [s, b, h, d] are read in place, so what flashmoe_train.nn, MultiheadAttention, "
    f"TorchTitan and Transformers pass; what has an address or a stride that is no multiple of {TMA_BYTES} bytes, or a "
    "stride of 0, is copied first: flashmoe_train.ops.attention.copies(q, k, v) names it"
)


def _operators() -> Iterator[Finding]:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    reasons = support.reasons(device, capability(device), dtype)
    for operator, reason in reasons.items():
        if reason is None:
            yield Finding("ok", operator, f"{runs(None, device)}, {str(dtype).removeprefix('torch.')}")
        elif capability(device) == HOPPER:
            yield Finding("problem", operator, f"{reason}: on this GPU `flashmoe train` asks for --allow-fallback")
        else:
            yield Finding("note", operator, runs(reason, device))
    if device == "cuda" and any(reasons[name] is None for name in reasons if name.startswith("attention")):
        yield Finding("ok", "attention layouts", _LAYOUTS)
