"""What the layers of a model share to exchange tokens under expert parallelism, and what happens when there is no room.

An exchange whose rows did not fit has left some out: its gradients are not those of the loss. Such a step is skipped by
all processes, as one with infinite gradients is under a gradient scaler, and reported with the layer's name a step
later, when the counts have come to the host by themselves. Several in a row end the run.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flashmoe_train.errors import UsageError
from flashmoe_train.ops.expert_parallel import Exchange

MOST_SKIPPED = 5  # steps in a row

# By all that they are made from: layers of the same sizes share one, and so do the models of a process.
_exchanges: dict[tuple, Exchange] = {}


@dataclass(frozen=True)
class Sharing:
    """What a job says of its exchanges."""

    tokens: int  # at most, that a process takes through a layer at once
    capacity: float
    timeout: float  # seconds

    def exchange(
        self, group: dist.ProcessGroup, experts: int, dim: int, top_k: int, dtype: torch.dtype, device: torch.device
    ) -> Exchange:
        """That of all layers of these sizes; made by the first of them."""
        key = (group, self, experts, dim, top_k, dtype, device)
        if key not in _exchanges:
            made = _exchanges[key] = Exchange(
                group,
                experts=experts,
                tokens=self.tokens,
                dim=dim,
                top_k=top_k,
                dtype=dtype,
                device=device,
                capacity=self.capacity,
                timeout=self.timeout,
            )
            why = made.collective_because
            how = "peer memory" if why is None else f"{dist.get_backend(group)}'s all_to_all_single: {why}"
            logging.info(f"flashmoe: experts on {made.world} processes exchange tokens over {how}")
        return _exchanges[key]


def forget() -> None:
    """Gives up all exchanges: their process groups are gone, or will be."""
    for exchange in _exchanges.values():
        exchange.close()
    _exchanges.clear()


class Overflows:
    """Skips the optimizer steps for which an exchange had no room. `key` is what to set, in the user's words."""

    def __init__(self, container: type[Optimizer], capacity: float, key: str, warn: Any) -> None:
        self.container, self.capacity, self.key, self.warn = container, capacity, key, warn
        self.before: dict[str, Tensor] = {}  # by exchange, what was lost when the last step was taken
        self.skip: Tensor | None = None  # 1.0: this step is to be skipped
        self.reports: list[tuple[Exchange, Tensor]] = []  # of the last step, on their way to the host
        self.skipped = 0  # steps in a row
        self.handle = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        self.handle.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Of the container of all optimizers, then of each of them."""
        if isinstance(optimizer, self.container):
            self._report()
            self._count()
        elif self.skip is not None:
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = self.skip  # type: ignore[attr-defined]  # as a gradient scaler says it
            elif self.skip.item():  # these optimizers cannot be told on the device
                optimizer.zero_grad(set_to_none=True)

    def _count(self) -> None:
        self.skip, self.reports = None, []
        for exchange in _exchanges.values():
            exchange.check()
            lost = exchange.lost - self.before.get(exchange.name, 0)
            self.before[exchange.name] = exchange.lost.clone()
            here = (lost.sum() > 0).float()
            self.skip = here if self.skip is None else torch.maximum(self.skip, here)
            self.reports.append((exchange, lost.to("cpu", non_blocking=True)))
        if self.skip is not None:
            dist.all_reduce(self.skip, dist.ReduceOp.MAX)
            self.flag = self.skip.to("cpu", non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event() if self.skip.is_cuda else None

    def _report(self) -> None:
        """What the last step has lost: it was copied to the host while this one was computed."""
        if self.skip is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        self.skipped = self.skipped + 1 if self.flag.item() else 0
        enough = f"set {self.key} above {self.capacity:g}"
        for exchange, lost in self.reports:
            for layer, rows in zip(exchange.layers, lost.tolist(), strict=False):
                if rows:
                    self.warn(
                        f"flashmoe: the last step was skipped: the experts of layer {layer} on rank {exchange.rank} of"
                        f" their group had no room for {rows} rows beyond {exchange.rows}; {enough}"
                    )
        if self.skipped >= MOST_SKIPPED:
            raise UsageError(
                f"{self.skipped} steps in a row were skipped because the experts of a process had no room for all"
                f" tokens: {enough}; the logs of all processes name the layers"
            )
