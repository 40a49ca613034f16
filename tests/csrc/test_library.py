"""The wheel and the compiled library in it, as far as a machine without a GPU can judge them: builds them, reads what
came out."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from flashmoe_train.bench.variants.compiler import machine_code, readings
from tests.csrc.test_hopper import Library, bad_maps

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
CMAKE = Path(sys.executable).with_name("cmake")
needs_nvcc = pytest.mark.skipif(not shutil.which(os.environ.get("CUDACXX", "nvcc")), reason="needs nvcc")


def run(command: Sequence[str | Path], environment: Mapping[str, str] = os.environ) -> str:
    """What a command prints, which has to succeed."""
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def build(folder: Path, environment: Mapping[str, str] = os.environ, target: str = "all") -> str:
    """Configures and builds into `folder` by hand; returns what the build printed."""
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    ]
    configured = run([CMAKE, "-S", ROOT / "csrc", "-B", folder / "build", *options], environment)
    compiling = [CMAKE, "--build", folder / "build", "--parallel", "2", "--verbose", "--target", target]
    return configured + run(compiling, environment)


class Wheel(NamedTuple):
    site: Path  # where it is installed
    log: str  # of the build
    seconds: Path  # of CPU time that nvcc took for each file

    @property
    def library(self) -> Path:
        return self.site / "flashmoe_train/libflashmoe_cuda.so"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    here = ["--no-build-isolation", "--check-build-dependencies", "--no-deps"]  # or pip would unpack another torch
    launcher = f"{sys.executable};{Path(__file__).with_name('timed.py')};{folder / 'seconds'}"
    defines = {"CMAKE_COMPILE_WARNING_AS_ERROR": "ON", "CMAKE_CUDA_COMPILER_LAUNCHER": launcher}
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    log = run([*pip, "wheel", "-v", *here, *settings, "--wheel-dir", folder, ROOT])
    (found,) = folder.glob("flashmoe_train-*-py3-none-linux_x86_64.whl")
    run([*pip, "install", "--quiet", "--no-deps", "--target", folder / "site", found])
    return Wheel(folder / "site", log, folder / "seconds")


@pytest.fixture(scope="module")
def self_test(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The self-test of csrc/hopper, and what its build printed."""
    folder = tmp_path_factory.mktemp("hopper")
    log = build(folder, target="flashmoe_hopper_test")
    return folder / "libflashmoe_hopper_test.so", log


def test_wheel_is_complete(wheel: Wheel, tmp_path: Path) -> None:
    """Installed anywhere, it brings its recipes, its versions and, where nvcc built it, its library along."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    assert wheel.library.exists() == (nvcc is not None)
    program = (
        # -S: without this environment's own, editable installation, but with its torch.
        f"import sys; sys.path[:0] = {[str(wheel.site), sysconfig.get_path('purelib')]!r}\n"
        "from flashmoe_train import recipe, versions\n"
        "print(recipe.find('quickstart'), len(versions.tested()))"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(wheel.site / "flashmoe_train/recipes/quickstart.toml"))


# Bytes that a kernel may spill, by a part of its name. Attention with head dim 256 keeps what it needs once a tile in
# memory: the registers it has are 240, of which 176 are scores, probabilities and sums (docs/kernels/attention.md).
SPILLED = {"forward_kernelINS0_5SizesI13__nv_bfloat16Li256": 32, "forward_kernelINS0_5SizesI6__halfLi256": 32}


@needs_nvcc
def test_no_kernel_spills(wheel: Wheel, self_test: tuple[Path, str]) -> None:
    found = readings(wheel.log)[0] + readings(self_test[1])[0]
    names = "\n".join(kernel.name for kernel in found)
    assert all(
        name in names
        for name in (
            "combine_kernel",
            "combine_backward_kernel",
            "finish_backward_kernel",
            "permute_kernel",
            "prepare_gather_kernel",
            "count_kernel",
            "place_kernel",
            "plan_kernel",
            "dispatch_kernel",
            "wait_kernel",
            "receive_kernel",
            "return_kernel",
            "sum_kernel",
            "router_kernel",
            "router_in_memory_kernel",
            "router_backward_kernel",
            "router_backward_in_memory_kernel",
            "sum_parts_kernel",
            "glu_kernel",
            "glu_backward_kernel",
            "products_kernel",
            "weight_gradient_kernel",
            "wgmma_kernel",
            "forward_kernel",
            "backward_kernel",
            "prepare_kernel",
            "convert_kernel",
            "add_parts_kernel",
        )
    )
    assert {kernel.architecture for kernel in found} == {"sm_80", "sm_90", "sm_90a"}
    for kernel in found:
        allowed = max((most for name, most in SPILLED.items() if name in kernel.name), default=0)
        assert kernel.spilled <= allowed, kernel


@needs_nvcc
def test_compiler_has_nothing_to_say(wheel: Wheel, self_test: tuple[Path, str]) -> None:
    """No warning, and none of ptxas' notes C75xx: register budgets that it ignored, wgmma that it serialised."""
    assert not re.findall(r".*(?:\bwarning\b|\bC75\d\d\b).*", wheel.log + self_test[1])


@needs_nvcc
def test_products_run_on_the_tensor_cores(self_test: tuple[Path, str]) -> None:
    """One instruction for every 16 of K: no wait between those of a batch, nothing in local memory."""
    dump = machine_code(self_test[0])
    assert dump is not None, "there is no cuobjdump, neither CUDA's nor Triton's"
    found = {name: code for name, code in dump.items() if "wgmma_kernel" in name}
    assert len(found) == 2 * 9 * 6  # types, N, operands
    for name, code in found.items():
        products = re.findall(r"\b(?:HGMMA\b.*|WARPGROUP\.DEPBAR)", code)
        assert [product[:5] for product in products] == ["HGMMA"] * 8 + ["WARPG"], name
        assert ["gsb0" in product for product in products[:8]] == [False] * 7 + [True], name
        assert not re.search(r"\b(?:LDL|STL)\b", code), name


@needs_nvcc
def test_every_file_compiles_in_seconds(wheel: Wheel) -> None:
    """A change has to be tried in seconds."""
    seconds = {Path(name).name: float(time) for name, time in map(str.split, wheel.seconds.read_text().splitlines())}
    assert {"combine.cu", "permute.cu", "products.cu", "forward.cu", "backward.cu"} <= seconds.keys()
    assert not {name: time for name, time in seconds.items() if time > 100}


@needs_nvcc
def test_tensor_map_names_what_it_cannot_take(self_test: tuple[Path, str]) -> None:
    library = Library(self_test[0])
    for text, arguments in bad_maps(address=1 << 30).items():
        with pytest.raises(RuntimeError, match=f"tensor map of x: .*{re.escape(text)}"):
            library("tensor_map", ctypes.byref(arguments))


@needs_nvcc
def test_every_claimed_operator_has_its_kernel(wheel: Wheel) -> None:
    """Exactly COMPILED are implemented. RTLD_LAZY: symbols of CUDA are missing here and not needed to register."""
    program = (
        "import ctypes, os, sys, torch\n"
        "torch.version.cuda = None\n"  # or the package would have loaded the checkout's library already
        "from flashmoe_train.ops import load_all; load_all()\n"
        "from flashmoe_train.ops.library import COMPILED, has_kernel\n"
        "schemas = torch._C._jit_get_all_schemas()\n"
        "operators = {s.name.removeprefix('flashmoe::') for s in schemas if s.name.startswith('flashmoe::')}\n"
        "in_python = {op for op in operators if has_kernel(op, 'cuda')}\n"
        "ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)\n"
        "compiled = {op for op in operators if has_kernel(op, 'cuda')} - in_python\n"
        "assert compiled == COMPILED, (compiled, COMPILED)\n"
        "print(len(compiled))"
    )
    found = subprocess.run([sys.executable, "-c", program, wheel.library], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 0


@needs_nvcc
def test_first_tensor_has_to_be_on_the_gpu(wheel: Wheel) -> None:
    """Another argument there is enough for PyTorch to choose these kernels. Here they are named, for want of a GPU."""
    program = (
        "import ctypes, os, sys, torch\n"
        "torch.version.cuda = None\n"
        "from flashmoe_train.ops import load_all; load_all()\n"
        "ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)\n"
        "on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)\n"
        "ops, x, index = torch.ops.flashmoe, torch.ones(4, 16), torch.zeros(4, 2, dtype=torch.int32)\n"
        "q = torch.ones(1, 4, 1, 64, dtype=torch.bfloat16)\n"
        "for op, arguments in (\n"
        "    (ops.attention_forward, (q, q, q, 1.0, -1, -1, None, None, False)),\n"
        "    (ops.attention_backward, (*[q] * 5, x[None], 1.0, -1, -1, None, None, False)),\n"
        "    (ops.route_plan, (index, 3)),\n"
        "    (ops.router_topk, (x, None, 2, 'softmax', False, 1.0, 1, 1, 1)),\n"
        "    (ops.router_topk_backward, (x[:, :2], None, x, index, 'softmax', False, 1.0, 1)),\n"
        "    (ops.moe_glu, (x, x, index[0], None)),\n"
        "    (ops.moe_glu_backward, (x, x, x, index[0], None)),\n"
        "    (ops.moe_forward, (x, x[None], x.T[None], x[None], None, index[0], None, None, 'combine')),\n"
        "    (ops.moe_down_backward, (x, x.T[None], None, x, index[0], None, None, 'combine', True)),\n"
        "    (ops.moe_up_backward, (x, x[None], x[None], index[0], None, None)),\n"
        "    (ops.moe_permute, (x, index[0], index)),\n"
        "    (ops.moe_combine, (x, index, None)),\n"
        "    (ops.moe_combine_backward, (x, x, index, torch.ones(4, 2))),\n"
        "    (ops.ep_plan, (index, 4, 2)),\n"
        "    (ops.ep_dispatch, (x, index, index[0], None, None, x, *[index] * 5, 0, 0, 0, 2, 1.0, 1, 0)),\n"
        "    (ops.ep_combine, (x, index, index[0], None, None, x, x, *[index] * 4, 0, 0, 0, 2, 1.0, 1, 0)),\n"
        "):\n"
        "    try:\n"
        "        op.default.redispatch(on_gpu, *arguments)\n"
        "    except RuntimeError as error:\n"
        "        print(str(error).splitlines()[0].split(', ')[-1])\n"
    )
    found = subprocess.run([sys.executable, "-c", program, wheel.library], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        f"{name} must be on a CUDA device like the other tensors"
        for name in (
            *("q", "q", "ids", "logits", "logits", "gate", "gate", "x", "dout", "dh", "x", "rows", "rows"),
            *("ids", "x", "rows"),
        )
    ]


@needs_nvcc
@pytest.mark.parametrize(
    "call, capability, text",
    [
        ("check_launch(cudaErrorNoKernelImageForDevice)", (7, 5), "compute capability 8.0 (Ampere) or later"),
        ('check_hopper("attention", 0)', (8, 6), "the attention kernel takes GPUs of compute capability 9.0 (Hopper), "
         "found 8.6; flashmoe_train.attention runs PyTorch's kernels there"),
        ('check_hopper("attention", 0)', (10, 0), "found 10.0"),
        ('check_hopper("attention", 0)', (9, 0), ""),
    ],
)  # fmt: skip
def test_other_gpu_is_told_what_is_needed(call: str, capability: tuple[int, int], text: str, tmp_path: Path) -> None:
    """What CUDA, here an imitation, says there, made an error as the operators do it."""
    (tmp_path / "launch.cpp").write_text(
        "#include <cstdio>\n"
        '#include "binding.h"\n'
        "cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {\n"
        f"  *value = which == cudaDevAttrComputeCapabilityMajor ? {capability[0]} : {capability[1]};\n"
        "  return cudaSuccess;\n"
        "}\n"
        'extern "C" AOTITorchError torch_c10_cuda_check_msg(\n'
        "    int32_t, const char*, const char*, uint32_t, bool, char**) {\n"
        "  return 0;\n"
        "}\n"
        'extern "C" void launch(char* text, size_t size) try {\n'
        f"  flashmoe::{call};\n"
        "} catch (const std::runtime_error& error) {\n"
        '  std::snprintf(text, size, "%s", error.what());\n'
        "}\n"
    )
    command = [
        os.environ.get("CUDACXX", "nvcc"), "-shared", "-cudart=none", "-Xcompiler=-fPIC", "-std=c++20", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}", tmp_path / "launch.cpp",
        f"-I{Path(torch.__file__).parent / 'include'}", "-o", tmp_path / "launch.so",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    found = ctypes.create_string_buffer(1000)
    # RTLD_LAZY: CUDA's part of PyTorch is missing here and not called.
    ctypes.CDLL(str(tmp_path / "launch.so"), mode=os.RTLD_LAZY).launch(found, ctypes.c_size_t(len(found)))
    assert (text in found.value.decode()) if text else not found.value


@needs_nvcc
def test_only_the_stable_abi_is_used(wheel: Wheel) -> None:
    """One binary for every PyTorch from 2.11 on: no unstable symbol, no CUDA library, no path of this build."""
    audit = Path(sys.executable).with_name("torch-abi-audit")
    found = subprocess.run([audit, "--check", "torch", wheel.library], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"Min torch: +2\.11\.0", found.stdout)
    dynamic = subprocess.run(["readelf", "--dynamic", wheel.library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed <= {"libtorch.so"} | system
    assert not re.search("RPATH|RUNPATH", dynamic)


@needs_nvcc
def test_nvcc_that_cannot_compile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CUDA"):
        build(tmp_path, os.environ | {"NVCC_APPEND_FLAGS": "--no-such-option"})


def test_without_nvcc_nothing_is_built(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "gmake", "ninja", "sh", "uname"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    log = build(tmp_path, {"PATH": str(tools), "CUDACXX": ""})
    assert "no nvcc found, so no CUDA library is built" in log
    assert not list(tmp_path.glob("*.so"))
