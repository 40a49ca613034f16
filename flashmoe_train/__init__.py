"""Fast attention and mixture-of-experts operators for training on Hopper GPUs.

`flashmoe_train.attention` and `flashmoe_train.moe` are functions over tensors, backed by `torch.ops.flashmoe.*`;
`flashmoe_train.nn` has modules over them, and `flashmoe_train.swap` puts them into a model that exists already.
`flashmoe_train.integrations` swaps them into the models of training frameworks; the `flashmoe` command trains.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flashmoe_train.swap import swap

if TYPE_CHECKING:
    from flashmoe_train import nn, ops
    from flashmoe_train.integrations.sdpa import swap_sdpa
    from flashmoe_train.ops.attention import attention
    from flashmoe_train.ops.moe import moe

swap.framework("transformers", "flashmoe_train.integrations.transformers")
swap.framework("megatron", "flashmoe_train.integrations.megatron.built")

__version__ = "0.1.0"
__all__ = ["attention", "moe", "nn", "ops", "swap", "swap_sdpa"]

_HOMES = {"attention": "ops.attention", "moe": "ops.moe", "swap_sdpa": "integrations.sdpa"}


def __getattr__(name: str) -> Any:
    """Loads what has operators in it when it is first asked for: they bring PyTorch's compiler and DTensor with them,
    for which nobody should wait who only starts other processes, as the `flashmoe` command does."""
    if name in ("nn", "ops"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
