"""What nvcc and ptxas say of kernels, and what machine code became of them."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from pydantic import BaseModel

from flashmoe_train.errors import UsageError


class Kernel(BaseModel):
    """What ptxas says of one."""

    name: str
    architecture: str = "sm_90a"  # that of variants
    registers: int  # of a thread at launch
    stack: int  # bytes
    spilled: int  # bytes of stores and loads


def readings(log: str) -> tuple[list[Kernel], list[str]]:
    """Every kernel in the output of `nvcc --resource-usage`, and what ptxas notes."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.S,
    )
    kernels = [
        Kernel(
            name=name,
            architecture=architecture,
            registers=int(registers),
            stack=int(stack),
            spilled=int(stores) + int(loads),
        )
        for name, architecture, stack, stores, loads, registers in found
    ]
    return kernels, re.findall(r"\bC75\d\d\b.*", log)


def machine_code(library: Path) -> dict[str, str] | None:
    """Of every kernel in a library, by its name; None without a disassembler. Triton's package carries one, which not
    every CUDA installation does."""
    triton = importlib.util.find_spec("triton")
    folders = [str(Path(x) / "backends/nvidia/bin") for x in (triton and triton.submodule_search_locations) or ()]
    tool = shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if tool is None:
        return None
    dump = subprocess.run([tool, "--dump-sass", str(library)], capture_output=True, text=True)
    functions = dump.stdout.split("Function : ")[1:]
    return {function.split(maxsplit=1)[0]: function for function in functions} if dump.returncode == 0 else None


def find_nvcc() -> str:
    """CUDACXX, or the one on PATH, or CUDA's usual place."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        raise UsageError("no nvcc found (set CUDACXX to point at one)")
    return found
