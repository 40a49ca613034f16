"""What runs the operators where, as their `supports()` say it: for `flashmoe doctor` and docs/operators.md."""

from collections.abc import Iterator

import torch

from flashmoe_train.ops import attention, moe
from flashmoe_train.ops.attention.checks import KERNEL_HEAD_DIMS
from flashmoe_train.ops.library import COMPILED, HOPPER

_AMPERE = "8.0"  # stands for every GPU that is no Hopper: our kernels that need no tensor cores begin here
_DEVICES = {
    "CPU": ("cpu", None, (torch.float32, torch.bfloat16)),
    "Hopper GPU, bfloat16 or float16": ("cuda", HOPPER, (torch.bfloat16, torch.float16)),
    "Hopper GPU, float32": ("cuda", HOPPER, (torch.float32,)),
    "other GPU from Ampere on": ("cuda", _AMPERE, (torch.float32, torch.bfloat16, torch.float16)),
}
_STEPS = ("router_topk", "route_plan", "moe_permute", "moe_glu", "moe_combine")  # without a case that could be refused


def reasons(
    device_type: str, capability: str | None, dtype: torch.dtype, *, complete: bool = False
) -> dict[str, str | None]:
    """For each public function and case: None if our operator runs it, else why PyTorch's kernels do.

    `capability` is the GPU's compute capability. Speaks of this installation, or of a `complete` one, which has the
    CUDA library.
    """
    found = {}
    for d, v in KERNEL_HEAD_DIMS:
        case = attention.AttentionCase(device_type, capability, dtype, d, v)
        found[f"attention {d}/{v}"] = attention.supports(case, complete=complete)
    usual = moe.MoECase(device_type, capability, dtype, dim=2048, hidden_dim=1024, experts=64)
    found["mixture of experts"] = moe.supports(usual, complete=complete)
    return found


def table() -> Iterator[tuple[str, ...]]:
    """Heading, then a line an operator and case: what a complete installation runs on which device."""
    yield ("", *_DEVICES)
    columns: list[dict[str, str]] = []
    for device, capability, dtypes in _DEVICES.values():
        column = {}
        for case in reasons(device, capability, dtypes[0]):
            answers = {_word(reasons(device, capability, dtype, complete=True)[case], device) for dtype in dtypes}
            column[case] = " or ".join(sorted(answers))
        column |= {op: "kernel" if device == "cuda" and op in COMPILED else "reference" for op in _STEPS}
        columns.append(column)
    for case in columns[0]:
        yield (f"`{case}`" if case in _STEPS else case, *(column[case] for column in columns))


def _word(reason: str | None, device_type: str) -> str:
    if reason is not None:
        return "fallback"
    return "kernel" if device_type == "cuda" else "reference"
