"""TorchTitan 0.3.x's attention on `flashmoe_train.attention`: causal within packed documents.

Shape suffixes are TorchTitan's: B batch, L sequence, N heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.core import attention_within_documents
from flashmoe_train.integrations.torchtitan.overrides.spmd import like, untyped

CAUSAL = (-1, 0)


class FlashMoEAttention(VarlenAttention):
    """In place of varlen attention, and of flex attention, whose masks of language models are the same.

    A VarlenAttention, because TorchTitan's decoder asks its configuration which masks it is to make: documents' bounds
    (`documents`), not a block mask. The names of the first three arguments are part of TorchTitan's contract: it
    declares by name how they are sharded.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        def __post_init__(self) -> None:
            if tuple(self.window_size) != CAUSAL:
                raise UsageError(f"swapped attention is causal, window_size {CAUSAL}; found {self.window_size}")

    def __init__(self, config: Config) -> None:
        torch.nn.Module.__init__(self)  # VarlenAttention's would choose a version of FlashAttention for the process

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        if not isinstance(attention_masks, VarlenMetadata):
            raise TypeError(f"attention_masks must be VarlenMetadata, found {type(attention_masks).__name__}")
        if out_transform is not None:
            raise NotImplementedError("swapped attention gives no logsumexp, which out_transform asks for")
        with untyped():
            out = attention_within_documents(q_BLNH, k_BLNH, v_BLNH, attention_masks.cu_seq_q, scale)
            out = out.unflatten(0, q_BLNH.shape[:2]).to(q_BLNH.dtype)
        return like(out, q_BLNH)
