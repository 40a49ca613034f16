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


@dataclass
class JobConfig:
    """TorchTitan merges this into its own JobConfig ([job] custom_config_module)."""

    flashmoe: FlashMoE = field(default_factory=FlashMoE)


def validate(config: FlashMoE) -> None:
    """Raises UsageError if a value is not one of those allowed: run natively, TorchTitan checks only the keys."""
    for key, value in vars(config).items():
        if value not in get_args(Choice):
            allowed = " or ".join(repr(choice) for choice in get_args(Choice))
            raise UsageError(f"[flashmoe] {key} must be {allowed}, found {value!r}")
