"""Exchange over peer memory: ranks of one node write into each other's memory, and tell each other by flags in it.

The host launches kernels and waits for nothing: counts, epochs and flags are on the devices. Memory is PyTorch's
symmetric memory: of each of four channels what other ranks write there, and the flags of all. Two channels bring tokens
and two bring sums, in turns: gradients need two sorts of tokens at once, and what one use still reads the next does not
wait for. csrc/expert_parallel/exchange.h says how ranks know what they may overwrite.
"""

import math
import os

import torch
import torch.distributed as dist
from torch import Tensor

from flashmoe_train.ops.expert_parallel.collective import Arrived
from flashmoe_train.ops.library import LIBRARY, TAGS, has_kernel

_LINK = (
    "Tensor(c!) signals, Tensor(d!) state, Tensor distance, Tensor(e!) report, int rank, int channel, int layer,"
    " int here, float timeout, int blocks, int read"
)
LIBRARY.define(
    "ep_dispatch(Tensor x, Tensor position, Tensor counts, Tensor? ids, Tensor? weights, Tensor(a!) rows,"
    f" Tensor(b!) routing, {_LINK}) -> (Tensor arrived, Tensor arrived_ids, Tensor arrived_weights)",
    tags=TAGS,
)
LIBRARY.define(
    "ep_combine(Tensor rows, Tensor position, Tensor arrived, Tensor? values, Tensor? ids, Tensor(a!) sums,"
    f" Tensor(b!) slot_values, {_LINK}) -> (Tensor out, Tensor dslots)",
    tags=TAGS,
)

MOST_RANKS = 8
BLOCKS = 32  # that push: more gain little, and take multiprocessors from whatever runs beside
_TURNS = 2  # channels of either direction
_CHANNELS, _SIGNALS = 2 * _TURNS, 3
_STATE_WORDS, _REPORT_WORDS = 16, 8
_AWAITED = ("send what it had for this one", "read what this one had sent")


def unsupported(group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """None if the ranks can exchange tokens `[T, dim]` over peer memory, else why not. Called by all of them."""
    reason = _unsupported_here(group.size(), device, dtype, dim)
    found: list[tuple[str | None, str]] = [(None, "")] * group.size()
    dist.all_gather_object(found, (reason, os.uname().nodename), group)
    for rank, (why, _) in enumerate(found):
        if why is not None:
            return f"rank {rank}: {why}"
    if len({node for _, node in found}) > 1:
        return "peer memory connects the GPUs of one node, found ranks on several"
    return None


def _unsupported_here(world: int, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if device.type != "cuda" or not has_kernel("ep_dispatch", device.type):
        return f"this installation has no compiled exchange for device type {device.type!r}"
    if world > MOST_RANKS:
        return f"peer memory connects at most {MOST_RANKS} ranks, found {world}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the exchange over peer memory takes torch.bfloat16 and torch.float16, found {dtype}"
    if dim % 8:
        return f"the exchange over peer memory takes a model dim that is a multiple of 8, found {dim}"
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        # PyTorch looks there for the ids of processes, and finds those of the processes that have died.
        return (
            "torchrun has started these processes again, with a store in which symmetric memory finds the last ones;"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment gives every start a new one"
        )
    others = set(range(torch.cuda.device_count())) - {device.index}
    if not all(torch.cuda.can_device_access_peer(device.index or 0, other) for other in others):
        return f"GPU {device.index} cannot reach the memory of all others"
    return None


class PeerMemory:
    """As `collective.Collective`, of tokens `[T, dim]`; made by all ranks of the group at once."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        experts: int,
        tokens: int,
        dim: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        timeout: float,
        blocks: int = BLOCKS,
    ) -> None:
        self.world, self.rank, self.here = group.size(), group.rank(), experts // group.size()
        self.timeout, self.blocks = timeout, blocks
        self.state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=device)
        places = (self.world, tokens)
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [(torch.int32, (_CHANNELS, _SIGNALS, self.world))]
        shapes += [(dtype, (*places, dim)), (torch.int32, (*places, 2 * top_k))] * _TURNS
        shapes += [(dtype, (*places, dim)), (torch.float32, (*places, top_k))] * _TURNS
        parts = self._shared(group, shapes, device)
        self.signals = parts[0]
        self.coming, self.returning = (list(zip(p[::2], p[1::2], strict=True)) for p in (parts[1:5], parts[5:9]))
        self.report = torch.zeros(_REPORT_WORDS, dtype=torch.int32, pin_memory=True)
        self.dispatches = self.combines = 0
        self.arrived = self.read = 0  # channels, as bits, that have brought tokens; those whose readers are launched

    def _shared(
        self, group: dist.ProcessGroup, shapes: list[tuple[torch.dtype, tuple[int, ...]]], device: torch.device
    ) -> list[Tensor]:
        """Tensors in memory that all ranks reach, one after the other; flags are zero on all of them on return."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in shapes]
        padded = [-(-size // 1024) * 1024 for size in sizes]
        memory = symmetric_memory.empty(sum(padded), dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(memory, group)
        begins = self.handle.buffer_ptrs
        if begins[self.rank] != memory.data_ptr():
            raise RuntimeError("symmetric memory does not begin where this rank's buffer does")
        self.distance = torch.tensor([begin - begins[self.rank] for begin in begins], dtype=torch.int64, device=device)
        memory[: padded[0]].zero_()
        torch.cuda.current_stream(device).synchronize()
        dist.barrier(group)
        chunks = memory.split(padded)
        return [
            chunk[:size].view(dtype).view(shape)
            for chunk, size, (dtype, shape) in zip(chunks, sizes, shapes, strict=True)
        ]

    def dispatch(
        self,
        x: Tensor,
        position: Tensor,
        counts: Tensor,
        layer: int,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Arrived:
        channel = self.dispatches % _TURNS
        self.dispatches += 1
        link = self._link(channel, layer)
        self.arrived |= 1 << channel
        rows, routing = self.coming[channel]
        arrived, own_ids, own_weights = torch.ops.flashmoe.ep_dispatch(
            x, position, counts, ids, weights, rows, routing, *link
        )
        return Arrived(rows.flatten(0, 1), arrived, own_ids, own_weights)

    def combine(
        self,
        rows: Tensor,
        position: Tensor,
        counts: Tensor,
        arrived: Tensor,
        layer: int,
        values: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        turn = self.combines % _TURNS
        self.combines += 1
        self.release()  # combined is what was computed of all that has arrived
        out, dslots = torch.ops.flashmoe.ep_combine(
            rows, position, arrived, values, ids, *self.returning[turn], *self._link(_TURNS + turn, layer)
        )
        return out, None if values is None else dslots

    def release(self) -> None:
        """Whatever reads the tokens that have arrived has been launched: the next exchange tells the others so."""
        self.read, self.arrived = self.read | self.arrived, 0

    def _link(self, channel: int, layer: int) -> tuple:
        read, self.read = self.read, 0
        return (
            self.signals,
            self.state,
            self.distance,
            self.report,
            self.rank,
            channel,
            layer,
            self.here,
            self.timeout,
            self.blocks,
            read,
        )

    def failure(self) -> tuple[int, int, str] | None:
        """(rank, layer, what it did not do) of the first wait in vain. Reads host memory: the device is not asked."""
        recorded, missing, layer, awaited, *_ = self.report.tolist()
        return (missing, layer, _AWAITED[awaited]) if recorded else None
