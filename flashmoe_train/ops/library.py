"""The `flashmoe` operator library: one place that defines schemas and knows which of them have a compiled kernel.

Python owns the operators (schema, reference, fake, autograd); compiled code only adds implementations to them. So
the operators exist, with the same schemas, on a machine that has no compiler and no GPU.
"""

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("flashmoe", "DEF")

# Dispatch key of a reference that runs on every device by PyTorch's own operations; a kernel for a device replaces it.
ANY_DEVICE = "CompositeExplicitAutograd"

# The CUDA implementations, built where nvcc is found; a PyTorch without CUDA could not load them.
CUDA_LIBRARY = Path(__file__).parents[1] / "libflashmoe_cuda.so"
if torch.version.cuda and CUDA_LIBRARY.exists():
    torch.ops.load_library(CUDA_LIBRARY)


def sources_digest(folder: Path) -> str:
    """Of the Python files in and below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# PyTorch keeps compiled code on disk by the operators that forward calls. What gradients of these are made of is traced
# into it and not looked at again: after an update it would call operators that are gone, or leave out new ones.
torch.compiler.config.cache_key_tag += f" flashmoe {sources_digest(Path(__file__).parent)}"

# The operators that it implements: a test holds the library to exactly these.
COMPILED = frozenset(
    {
        "attention_forward",
        "attention_backward",
        "router_topk",
        "router_topk_backward",
        "route_plan",
        "moe_forward",
        "moe_down_backward",
        "moe_up_backward",
        "moe_weight_gradient_down_",
        "moe_weight_gradient_up_",
        "moe_glu",
        "moe_glu_backward",
        "moe_permute",
        "moe_combine",
        "moe_combine_backward",
        "ep_plan",
        "ep_dispatch",
        "ep_combine",
    }
)

# Compute capability of the GPUs that the kernels for tensor cores are compiled for: sm_90a runs on no other.
HOPPER = "9.0"
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)

# Operators are functional and safe under torch.compile; the compiler may not reorder the strides it hands them.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sums and statistics behind tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What modules hand to the operators for an `x`: autocast's dtype where it is on, since operators do not cast.
    Like autocast itself it leaves float64 alone."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype != torch.float64 and _autocasts(device) else x.dtype


# Others ("meta") have no autocast to ask about. Not asked when it is needed: torch.compile of 2.11 cannot trace that.
_WITH_AUTOCAST = frozenset(name for name in ("cpu", "cuda") if torch.amp.is_autocast_available(name))


def _autocasts(device_type: str) -> bool:
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, products are computed in the dtypes that their operands have."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else contextlib.nullcontext()


def reverse_mode_only(function: str, *tensors: torch.Tensor | None) -> None:
    """Refuses tensors that have tangents: PyTorch takes the derivative of an operator in forward mode for zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{function} has no derivative in forward mode (torch.func.jvp, dual tensors)")


def check_finite(name: str, number: float) -> None:
    """Raises unless `number` is finite, a compiler's symbolic one too."""
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, found {number}")


def implement(op: str, reference: Callable[..., Any], key: str) -> None:
    """Makes `reference` the implementation of `flashmoe::op` for a dispatch key, whatever autocast is on around it."""

    @functools.wraps(reference)
    def run(first: torch.Tensor, *arguments: Any) -> Any:
        with no_autocast(first.device.type):
            return reference(first, *arguments)

    LIBRARY.impl(op, run, key)


def segments(name: str, bounds: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """(begin, end) of each segment that `bounds` `[segments + 1]` cuts `rows` rows into. Reads values: for references.

    Raises ValueError that names the argument unless the bounds start at 0, do not decrease and end within the rows.
    """
    values = bounds.tolist()
    if values[0] != 0 or values[-1] > rows or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name} must start at 0, not decrease and end within the {rows} rows, found {values}")
    return list(itertools.pairwise(values))


def differentiable_once(op: str) -> None:
    """Says of `op`, which computes a gradient, that it has none of its own: asking for it is an error on every device.

    Otherwise a reference would record PyTorch's own operations where a kernel records nothing.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"flashmoe::{op} has no gradient: the operators can be differentiated once")

    torch.library.register_autograd(f"flashmoe::{op}", refuse, lib=LIBRARY)


def refused_by_tensor_cores(takes: str, capability: str | None, dtype: torch.dtype) -> str | None:
    """None if a GPU and a dtype are those of the kernels for tensor cores, else the reason, which begins with what
    `takes` says: "the attention kernel takes"."""
    if capability != HOPPER:
        return f"{takes} GPUs of compute capability {HOPPER} (Hopper), found {capability}"
    if dtype not in TENSOR_CORE_DTYPES:
        return f"{takes} {' and '.join(map(str, TENSOR_CORE_DTYPES))}, found {dtype}"
    return None


def runs(unsupported: str | None, device_type: str) -> str:
    """What our public functions run for a case, by what its `supports` says."""
    if unsupported is not None:
        return f"PyTorch's kernels: {unsupported}"
    return "compiled kernels" if device_type == "cuda" else "reference kernels"


@torch.compiler.assume_constant_result
def has_kernel(op: str, device_type: str, complete: bool = False) -> bool:
    """Whether `flashmoe::op` has an implementation for tensors on `device_type` ("cpu", "cuda", ...): here, or in a
    `complete` installation, which has the CUDA library."""
    if complete and device_type == "cuda":
        return op in COMPILED
    key = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"flashmoe::{op}", key)


@torch.compiler.assume_constant_result
def capability(device_type: str, index: int | None = None) -> str | None:
    """Compute capability ("9.0") of a CUDA device, by default the current one; None where there is none."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(index))
