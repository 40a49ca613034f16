"""Megatron-core on a machine without a CUDA GPU: what it asks of `torch.cuda` and NCCL, given by CPU and gloo.

Each adjustment says what fails without it; none of them touches a machine that has a CUDA GPU. `apply()` is for a
process that trains, `adjusted()` for one that does other things afterwards.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

_FACTORIES = ("zeros", "ones", "tensor", "empty", "full", "arange", "empty_like", "zeros_like")


def apply() -> None:
    """Adjusts torch and Megatron in this process. Does nothing where there is a GPU, and nothing the second time."""
    if not torch.cuda.is_available() and not getattr(apply, "done", False):
        apply.done = True  # type: ignore[attr-defined]
        for target, name, value in _adjustments():
            setattr(target, name, value)


@contextlib.contextmanager
def adjusted() -> Iterator[None]:
    """The same for the length of a `with`."""
    if torch.cuda.is_available() or getattr(apply, "done", False):
        yield
        return
    changes = list(_adjustments())
    missing = object()
    before = [(target, name, vars(target).get(name, missing)) for target, name, _ in changes]
    try:
        for target, name, value in changes:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in reversed(before):
            if value is missing:
                delattr(target, name)
            else:
                setattr(target, name, value)


def _adjustments() -> Iterator[tuple[Any, str, Any]]:
    """(where, name, what it becomes)."""
    # Parameters, buffers and position ids are made on torch.cuda.current_device(), or on device "cuda".
    yield torch.cuda, "current_device", lambda: torch.device("cpu")
    _device_constructors()  # remembers, the first time, what `with torch.device("meta")` is to catch: not our wrappers
    for name in _FACTORIES:
        yield torch, name, _on_cpu(getattr(torch, name))
    # Checkpoints of the distributed optimizer are gathered on the device.
    yield torch.Tensor, "cuda", lambda tensor, *args, **options: tensor
    # Optimizers and the reduction of the gradients' norm tell dtypes by names such as "torch.cuda.FloatTensor".
    yield torch.Tensor, "type", _cuda_type(torch.Tensor.type)
    # Communication that overlaps computation has streams and events of its own.
    yield torch.cuda, "Stream", _Stream
    yield torch.cuda, "Event", _Event
    yield torch.cuda, "current_stream", lambda device=None: _Stream()
    yield torch.cuda, "default_stream", lambda device=None: _Stream()
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.cuda, "synchronize", lambda device=None: None
    yield torch.Tensor, "record_stream", lambda tensor, stream: None
    yield from _random_state()
    # Split sizes are moved to the host by a function that leaves CPU tensors as they are; all_to_all_single wants ints.
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    for module in (moe_utils, token_dispatcher):
        yield module, "maybe_move_tensor_to_cpu", _on_host
    # Experts are initialised on the CPU from a random state that all processes have alike, where on a GPU each has its
    # own for them: under expert parallelism an expert begins with a twin in every other process.
    from megatron.core.transformer.moe.experts import SequentialMLP

    from flashmoe_train.integrations.megatron.experts import FlashMoEExperts

    for experts in (SequentialMLP, FlashMoEExperts):
        yield experts, "__init__", _among_all_experts(experts.__init__)
    # gloo takes no device ids.
    yield dist, "barrier", _barrier(dist.barrier)


def _random_state() -> Iterator[tuple[Any, str, Any]]:
    # Megatron's tracker of random states forks the state of the CUDA generator.
    from megatron.core.tensor_parallel import random

    yield torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()
    yield torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)
    yield torch.cuda, "manual_seed", torch.manual_seed
    yield random, "_get_cuda_rng_state", lambda *args, **options: torch.get_rng_state()
    yield random, "_set_cuda_rng_state", lambda state, *args, **options: torch.set_rng_state(state)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device")).startswith("cuda"):
            options["device"] = "cpu"
        return factory(*args, **options)

    return make


def _cuda_type(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
        if dtype is not None:
            return stock(self, dtype, *args, **options)
        return "torch.cuda." + stock(self).rsplit(".", 1)[1]

    return type_


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _among_all_experts(stock: Callable[..., None]) -> Callable[..., None]:
    """Initialises the experts of all processes, in their order, and keeps those of this process: they are those that a
    process alone would have, and so is what is initialised after them."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        given = signature.bind(self, *args, **options).arguments
        config, group = given["config"], given["pg_collection"].ep
        draws = config.use_cpu_initialization and config.perform_initialization
        for rank in range(group.size()) if draws else (group.rank(),):
            experts = self if rank == group.rank() else object.__new__(type(self))
            stock(experts, *args, **options)

    return __init__


def _barrier(stock: Callable[..., Any]) -> Callable[..., Any]:
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return stock(group=group, async_op=async_op)

    return barrier


class _Stream:
    """What Megatron calls of a stream, of which a CPU has one."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "_Event":
        return _Event()


class _Event:
    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True
