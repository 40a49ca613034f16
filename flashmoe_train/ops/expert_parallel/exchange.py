"""What the ranks of a group share for the layers of one type: the way rows are exchanged, its memory, what was lost."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from flashmoe_train.ops import moe
from flashmoe_train.ops.expert_parallel import peer
from flashmoe_train.ops.expert_parallel.collective import Collective

MOST_LAYERS = 1024  # that share an exchange
CAPACITY = 2.0
TIMEOUT = 300.0  # seconds

# Operators know an exchange by its name, and no two have the same one.
_exchanges: dict[str, "Exchange"] = {}
_numbers = itertools.count()


def by_name(name: str) -> "Exchange":
    return _exchanges[name]


class ExchangeCase(NamedTuple):
    """What decides whether the experts of a layer can be shared by processes."""

    device_type: str
    capability: str | None  # compute capability of the GPU
    dtype: torch.dtype
    dim: int
    hidden_dim: int
    experts: int  # E, of all ranks
    world: int


def supports(case: ExchangeCase, *, complete: bool = False) -> str | None:
    """None if `routed_experts` takes the case, else the reason why not. On a GPU it takes what our kernels of the
    experts take: there is no fallback inside it."""
    if case.world < 1 or case.experts % case.world != 0:
        return f"experts must be shared evenly, found {case.experts} experts on {case.world} ranks"
    experts = moe.MoECase(
        case.device_type, case.capability, case.dtype, case.dim, case.hidden_dim, max(1, case.experts // case.world)
    )
    return moe.supports(experts, complete=complete)


class Exchange:
    """Made once for layers of the same sizes, by all ranks of `group` at the same place of their programs.

    Args:
        group: the ranks.
        experts: E, of all ranks together, a multiple of their number.
        tokens: M, the most tokens that any rank brings to one call.
        dim: d. top_k: K. dtype: of the tokens.
        device: of the tokens.
        capacity: room for the rows that the experts here compute, in multiples of M · K, an even share. Rows beyond it
            are left out and counted in `lost`.
        timeout: seconds that a rank waits for another one before it gives up.
        peer_memory: exchange over peer memory; None: where the ranks can.

    Raises ValueError if these do not fit together.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        experts: int,
        tokens: int,
        dim: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: float = CAPACITY,
        timeout: float = TIMEOUT,
        peer_memory: bool | None = None,
    ) -> None:
        self.world, self.rank = group.size(), group.rank()
        for name, value in {"experts": experts, "tokens": tokens, "dim": dim, "top_k": top_k}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if experts % self.world:
            raise ValueError(f"experts must be a multiple of the {self.world} ranks, found {experts}")
        if not (capacity > 0 and timeout > 0):
            raise ValueError(f"capacity and timeout must be positive, found {capacity} and {timeout}")
        self.experts, self.tokens, self.dim, self.top_k, self.dtype = experts, tokens, dim, top_k, dtype
        self.device, self.capacity, self.timeout = torch.device(device), capacity, timeout
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.here = experts // self.world
        # More cannot come than all slots of all ranks.
        self.rows = math.ceil(min(self.world, capacity) * tokens * top_k)
        self.layers: list[str] = []
        self.order = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.lost = torch.zeros(MOST_LAYERS, dtype=torch.int64, device=self.device)
        # Why not over peer memory; None: it is.
        self.collective_because = (
            "it was asked for"
            if peer_memory is False or self.world == 1
            else peer.unsupported(group, self.device, dtype, dim)
        )
        if peer_memory and self.collective_because is not None:
            raise ValueError(f"peer_memory cannot be used: {self.collective_because}")
        self.transport: Collective | peer.PeerMemory
        if self.collective_because is None:
            self.transport = peer.PeerMemory(group, experts, tokens, dim, top_k, dtype, self.device, timeout)
        else:
            self.transport = Collective(group, experts, tokens)
        self.name = f"exchange{next(_numbers)}"
        _exchanges[self.name] = self

    @property
    def places(self) -> int:
        """S, for arrived tokens."""
        return self.world * self.tokens

    def number_of(self, layer: str) -> int:
        """Of a layer, by the order in which they are first named."""
        if layer not in self.layers:
            if len(self.layers) == MOST_LAYERS:
                raise ValueError(f"an exchange is shared by at most {MOST_LAYERS} layers, found one more: {layer!r}")
            self.layers.append(layer)
        return self.layers.index(layer)

    def check(self) -> None:
        """Raises RuntimeError if a rank has been waited for in vain. Does not wait for the device itself."""
        if (failure := self.transport.failure()) is not None:
            missing, layer, what = failure
            raise RuntimeError(
                f"expert parallelism, layer {self.layers[layer]!r}: rank {self.rank} waited {self.timeout:g} s for rank"
                f" {missing} of its group to {what}. That one has died, is stuck, or ran other layers; results since"
                " then are worthless"
            )

    def close(self) -> None:
        """Gives the memory back; all ranks are done with it."""
        _exchanges.pop(self.name, None)
