"""PyTorch's norms under sequence parallelism, which Megatron's own wrapper of them refuses (defect 2 of `compat`)."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from flashmoe_train.errors import UsageError


class Norm:
    """Builds `torch.nn.RMSNorm` or `LayerNorm` as WrappedTorchNorm does, for any parallelism.

    With sequence parallelism a process sees part of the tokens, so that gradients of the weights have to be summed over
    the tensor-parallel group: Megatron does so for parameters that are marked by `sequence_parallel`.
    """

    takes_place_of = "WrappedTorchNorm"

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> Any:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        kind = kinds.get(config.normalization)
        if kind is None:
            raise UsageError(f"normalization must be one of {', '.join(kinds)}, found {config.normalization!r}")
        for key in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, key, False):
                raise UsageError(f"{key}: PyTorch's norms have no such thing")
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
