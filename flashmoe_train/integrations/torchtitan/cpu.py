"""TorchTitan on a machine without a CUDA GPU: what it expects of `torch.cuda` and NCCL, given by CPU and gloo.

`apply()` has to run before `import torchtitan`, which looks for the device while it is imported. Each adjustment says
what fails without it; none of them touches a machine that has a CUDA GPU.
"""

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._utils
import torch.distributed as dist


def apply() -> None:
    """Adjusts torch in this process. Does nothing where there is a GPU, and nothing the second time."""
    if torch.cuda.is_available() or getattr(apply, "done", False):
        return
    apply.done = True  # type: ignore[attr-defined]
    _find_cpu()
    _device_functions()
    _histc()
    _random_numbers()
    _gloo()
    _profiler()


def _find_cpu() -> None:
    # torchtitan.tools.utils falls back to "cuda" when torch finds no accelerator.
    torch._utils._get_available_device_type = lambda: "cpu"


def _device_functions() -> None:
    # torchtitan.components.metrics reads the device's name and memory; torch.cpu has no such functions.
    memory = types.SimpleNamespace(total_memory=_physical_memory())
    stand_ins: dict[str, Callable[..., Any]] = {
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": lambda device=None: memory,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
    }
    for name, function in stand_ins.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _histc() -> None:
    # TorchTitan's router counts its integer ids with histc, which has no integer kernel on the CPU.
    histc = torch.histc

    def histc_of_integers(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
        if x.is_floating_point() or x.device.type != "cpu":
            return histc(x, bins=bins, min=min, max=max)
        return torch.zeros(bins, dtype=x.dtype).scatter_add(0, x, torch.ones_like(x))  # a static shape under compile

    torch.histc = histc_of_integers  # type: ignore[assignment]


def _random_numbers() -> None:
    # Only on CUDA-like devices does DTensor give the shards of a tensor random numbers of their own. On a CPU processes
    # fill theirs from equal states: what FSDP cuts in two begins with equal halves, and experts have twins in the other
    # processes of expert parallelism. So each process draws the whole tensor and keeps its shard. States then go on as
    # in a process alone, and a model begins with the same weights in every layout; except under pipeline parallelism,
    # where TorchTitan gives each stage a seed.
    from torch import nn
    from torch.distributed.tensor import DTensor, Replicate

    def of_the_whole(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(fill)
        def fill_shards(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if not isinstance(tensor, DTensor):
                return fill(tensor, *args, **options)
            whole = fill(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device), *args, **options)
            everywhere = [Replicate()] * tensor.device_mesh.ndim
            with torch.no_grad():
                numbers = DTensor.from_local(whole, tensor.device_mesh, everywhere, run_check=False)
                tensor.copy_(numbers.redistribute(placements=tensor.placements))
            return tensor

        return fill_shards

    DTensor.normal_ = of_the_whole(torch.Tensor.normal_)  # type: ignore[method-assign]
    DTensor.uniform_ = of_the_whole(torch.Tensor.uniform_)  # type: ignore[method-assign]
    # It draws again while numbers are out of bounds; of a DTensor torch 2.13 asks that process by process, and their
    # states part.
    nn.init.trunc_normal_ = of_the_whole(nn.init.trunc_normal_)


def permute_without_triton() -> None:
    """The permutation of 0.2.x's expert parallelism is a Triton kernel; TorchTitan ships a twin for the CPU."""
    if torch.cuda.is_available():
        return
    from torchtitan.models.moe import kernels

    kernels.fill_indices_wrapper = lambda *args, **kwargs: kernels.fill_indices_cpu(*args[:6])


def _gloo() -> None:
    # torchtitan.distributed.utils calls barrier(device_ids=["cpu"]); gloo takes no device ids.
    barrier = dist.barrier

    def barrier_without_devices(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    dist.barrier = barrier_without_devices

    # The exchange of 0.3.x's expert parallelism sends lists of tensors; gloo's takes none that differ in size.
    def all_to_all(outputs: Any, inputs: Any, group: Any = None, async_op: bool = False) -> None:
        assert not async_op
        received, sent = ([len(x) for x in tensors] for tensors in (outputs, inputs))
        whole = torch.cat(outputs)
        dist.all_to_all_single(whole, torch.cat(inputs), received, sent, group=group)
        for output, part in zip(outputs, whole.split(received), strict=True):
            output.copy_(part)

    dist.all_to_all = all_to_all  # type: ignore[assignment]

    # FSDP with a gradient_divide_factor asks for a pre-multiplied sum, which gloo does not have.
    from torch.distributed.fsdp import FSDPModule

    set_factor = FSDPModule.set_gradient_divide_factor

    def set_gradient_divide_factor(self: FSDPModule, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_gradient_divide_factor  # type: ignore[method-assign]


def _profiler() -> None:
    # TorchTitan asks for the activities of the CPU and of a device, which is None here: a TypeError.
    class Profile(torch.profiler.profile):
        def __init__(self, *, activities: Any = None, **options: Any) -> None:
            super().__init__(activities=activities and [a for a in activities if a is not None], **options)

    torch.profiler.profile = Profile  # type: ignore[misc]
