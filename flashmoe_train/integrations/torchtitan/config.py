"""Our table in a TorchTitan job file: `[flashmoe]`."""

from dataclasses import dataclass, field
from typing import get_args

from flashmoe_train.errors import UsageError
from flashmoe_train.schema import Choice


@dataclass
class FlashMoE:
    attention: Choice = "flashmoe"
    """Whose attention runs: "flashmoe" or TorchTitan's own, "stock"."""

    moe: Choice = "flashmoe"
    """Whose gather, experts and combine run in mixture-of-experts blocks; no effect on dense models."""

    dispatch: Choice = "stock"
    """Whose exchange runs under expert parallelism; no effect without it. "flashmoe" needs moe = "flashmoe"."""

    dispatch_capacity: float = 2.0
    """Rows that the experts of a process have room for with dispatch = "flashmoe", as multiples of an even share."""


@dataclass
class JobConfig:
    """TorchTitan merges this into its own JobConfig ([job] custom_config_module)."""

    flashmoe: FlashMoE = field(default_factory=FlashMoE)


def validate(config: FlashMoE) -> None:
    """Raises UsageError if a value is not one of those allowed: run natively, TorchTitan checks only the keys."""
    if not config.dispatch_capacity > 0:
        raise UsageError(f"[flashmoe] dispatch_capacity must be positive, found {config.dispatch_capacity}")
    for key in ("attention", "moe", "dispatch"):
        if (value := getattr(config, key)) not in get_args(Choice):
            allowed = " or ".join(repr(choice) for choice in get_args(Choice))
            raise UsageError(f"[flashmoe] {key} must be {allowed}, found {value!r}")
    if config.dispatch == "flashmoe" and config.moe == "stock":
        raise UsageError(
            '[flashmoe] dispatch = "flashmoe" hands tokens to our experts: it needs moe = "flashmoe", found "stock"'
        )
