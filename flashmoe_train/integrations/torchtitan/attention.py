"""TorchTitan's attention modules on `flashmoe_train.attention`."""

import torch
from torch import Tensor
from torchtitan.models.attention import (
    FlexAttentionWrapper,
    ScaledDotProductAttentionWrapper,
    VarlenAttentionWrapper,
)

from flashmoe_train.ops.attention import attention
from flashmoe_train.swap import Swap


class FlashMoEAttention(ScaledDotProductAttentionWrapper):
    """q `[B, H, S, D]`, k `[B, G, T, D]`, v `[B, G, T, V]` in, `[B, H, S, V]` out."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool = True,
    ) -> Tensor:
        # SDPA casts under autocast; so do we, since rotary embeddings may leave q and k wider than v.
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, causal=is_causal, softmax_scale=scale).transpose(1, 2)


SWAPS = [
    Swap(ScaledDotProductAttentionWrapper, FlashMoEAttention),
    Swap(FlexAttentionWrapper, None, lambda module: "attention under a block mask is not supported yet"),
    Swap(VarlenAttentionWrapper, None, lambda module: "attention over packed documents is not supported yet"),
]


def save_in_selective_checkpointing(model_name: str) -> bool:
    """Adds the operator to the outputs that the model's selective activation checkpointing keeps.

    Returns whether the model has such a list; it is a module-level set in `torchtitan.models.<name>.infra.parallelize`.
    """
    import importlib

    try:
        module = importlib.import_module(f"torchtitan.models.{model_name}.infra.parallelize")
        save_list = module._op_sac_save_list
    except (ModuleNotFoundError, AttributeError):
        return False
    save_list.add(torch.ops.flashmoe.attention_forward.default)
    return True
