"""What the layers of a model share to exchange tokens under expert parallelism, and what happens when there is no room.

An exchange whose rows did not fit has left some out: its gradients are not those of the loss. Such a step is skipped by
all processes, as one with infinite gradients is under a gradient scaler, and reported with the layer's name. Several in
a row end the run. How steps are skipped is the frameworks' matter.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flashmoe_train.errors import UsageError
from flashmoe_train.ops.expert_parallel import Exchange
from flashmoe_train.ops.expert_parallel.exchange import TIMEOUT

MOST_SKIPPED = 5  # steps in a row

# By all that they are made from: layers of the same sizes share one, and so do the models of a process.
_exchanges: dict[tuple, Exchange] = {}


@dataclass(frozen=True)
class Sharing:
    """What a job says of its exchanges."""

    tokens: int | None  # at most, that a process takes through a layer at once; None: as many as the first call brings
    capacity: float | None  # None: room for all that can come
    timeout: float = TIMEOUT  # seconds

    def exchange(
        self,
        group: dist.ProcessGroup,
        experts: int,
        dim: int,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        first: int = 0,
    ) -> Exchange:
        """That of all layers of these sizes; made by the first of them, whose first call brings `first` tokens."""
        key = (group, self, experts, dim, top_k, dtype, device)
        if key not in _exchanges:
            made = _exchanges[key] = Exchange(
                group,
                experts=experts,
                tokens=_most(group, first, device) if self.tokens is None else self.tokens,
                dim=dim,
                top_k=top_k,
                dtype=dtype,
                device=device,
                capacity=float(group.size()) if self.capacity is None else self.capacity,
                timeout=self.timeout,
            )
            why = made.collective_because
            how = "peer memory" if why is None else f"{dist.get_backend(group)}'s all_to_all_single: {why}"
            logging.info(f"flashmoe: experts on {made.world} processes exchange tokens over {how}")
        return _exchanges[key]


def _most(group: dist.ProcessGroup, tokens: int, device: torch.device) -> int:
    """Every process needs room for as many as any of them has."""
    most = torch.tensor(max(1, tokens), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)


def forget() -> None:
    """Gives up all exchanges: their process groups are gone, or will be."""
    for exchange in _exchanges.values():
        exchange.close()
    _exchanges.clear()


class Overflows:
    """Finds what exchanges had no room for. `key` is what to set, in the user's words; `device` has the processes'
    tensors."""

    def __init__(self, capacity: float, key: str, device: torch.device, warn: Callable[[str], None]) -> None:
        self.capacity, self.key, self.device, self.warn = capacity, key, device, warn
        self.before: dict[str, Tensor] = {}  # by exchange, what was lost when it was counted last
        self.skip: Tensor | None = None  # 1.0: this step is to be skipped
        self.reports: list[tuple[Exchange, Tensor]] = []  # of the last count, on their way to the host
        self.skipped = 0  # steps in a row
        self.skipped_steps = self.lost_rows = 0  # in all, of all processes

    def count(self) -> Tensor:
        """Whether any process has lost rows since the last call, 1.0 or 0.0, on the device; all processes call it."""
        rows, self.reports = torch.zeros((), device=self.device), []
        for exchange in _exchanges.values():
            exchange.check()
            lost = exchange.lost - self.before.get(exchange.name, 0)
            self.before[exchange.name] = exchange.lost.clone()
            rows += lost.sum()
            self.reports.append((exchange, lost.to("cpu", non_blocking=True)))
        dist.all_reduce(rows)
        self.skip, self.lost = (rows > 0).float(), rows.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream().record_event() if rows.is_cuda else None
        return self.skip

    def report(self) -> bool:
        """Whether the step that was counted last is skipped; warns of what it has lost here, which was copied to the
        host in the meantime. Raises UsageError after `MOST_SKIPPED` of them in a row."""
        if self.skip is None:
            return False
        skipped = self._warn("the last step was skipped")
        self.skip = None  # said once
        self.skipped = self.skipped + 1 if skipped else 0
        self.skipped_steps += skipped
        self.lost_rows += int(self.lost.item())
        if self.skipped >= MOST_SKIPPED:
            raise UsageError(
                f"{self.skipped} steps in a row were skipped because the experts of a process had no room for all"
                f" tokens: {self._enough()}; the logs of all processes name the layers"
            )
        return skipped

    def report_validation(self) -> None:
        """Counts and warns of what was lost without gradients: the next step is not to blame, nor is the last one
        forgotten. All processes call it."""
        self.report()
        self.count()
        self._warn("the held-out loss leaves rows out")
        self.skip = None

    def _enough(self) -> str:
        return f"set {self.key} above {self.capacity:g}"

    def _warn(self, what: str) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        for exchange, lost in self.reports:
            for layer, rows in zip(exchange.layers, lost.tolist(), strict=False):
                if rows:
                    self.warn(
                        f"flashmoe: {what}: the experts of layer {layer} on rank {exchange.rank} of their group had no"
                        f" room for {rows} rows beyond {exchange.rows}; {self._enough()}"
                    )
        return self.lost.item() > 0
