"""Steps whose exchange had no room for all rows, skipped under TorchTitan without waiting for the device.

They are reported a step later, when the counts have come to the host by themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flashmoe_train.integrations import exchanges


class Overflows(exchanges.Overflows):
    """Skips the optimizer steps for which an exchange had no room."""

    def __init__(
        self,
        container: type[Optimizer],
        capacity: float,
        key: str,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(capacity, key, device, warn)
        self.container = container
        self.handle = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        self.handle.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Of the container of all optimizers, then of each of them."""
        if isinstance(optimizer, self.container):
            self.report()
            self.count()
        elif self.skip is not None:
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = self.skip  # type: ignore[attr-defined]  # as a gradient scaler says it
            elif self.skip.item():  # these optimizers cannot be told on the device
                optimizer.zero_grad(set_to_none=True)
