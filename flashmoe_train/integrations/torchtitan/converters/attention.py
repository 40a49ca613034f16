"""TorchTitan's attention modules on `flashmoe_train.attention`.

They take q `[B, H, S, D]`, k `[B, G, S, D]` and v `[B, G, S, V]`, which are views of `[B, S, heads, dim]`: transposing
them back costs nothing. qwen3 under tensor parallelism hands over DTensors and relies on the operator's sharding rule.
"""

from torch import Tensor, nn
from torchtitan.models.attention import (
    FlexAttentionWrapper,
    ScaledDotProductAttentionWrapper,
    VarlenAttentionWrapper,
    VarlenMetadata,
)

from flashmoe_train.integrations.torchtitan.converters.context import Context
from flashmoe_train.integrations.torchtitan.converters.documents import DocumentMask, with_document_masks
from flashmoe_train.integrations.torchtitan.core import attention_within_documents, autocast
from flashmoe_train.ops.attention import attention
from flashmoe_train.swap import Swap


class FlashMoEAttention(ScaledDotProductAttentionWrapper):
    """In place of scaled_dot_product_attention: causal or full."""

    context: Context | None = None  # who has the rest of the sequence

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
        q, k, v = (x.transpose(1, 2) for x in autocast(q, k, v))
        if self.context is not None:
            return self.context.attention(q, k, v, is_causal, scale).transpose(1, 2)
        return attention(q, k, v, causal=is_causal, softmax_scale=scale).transpose(1, 2)


class FlashMoEDocumentAttention(FlexAttentionWrapper):
    """In place of flex attention: causal, within documents if the mask has any."""

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        block_mask: DocumentMask,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if block_mask.documents is not None:
            out = _within_documents(q, k, v, block_mask.documents, scale)
            return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in autocast(q, k, v))
        return attention(q, k, v, causal=True, softmax_scale=scale).transpose(1, 2)


class FlashMoEVarlenAttention(VarlenAttentionWrapper):
    """In place of varlen_attn: causal within documents, `[B · S, H, V]` out."""

    def forward(
        self, xq: Tensor, xk: Tensor, xv: Tensor, attention_masks: VarlenMetadata, scale: float | None = None
    ) -> Tensor:
        return _within_documents(xq, xk, xv, attention_masks, scale)


def _within_documents(q: Tensor, k: Tensor, v: Tensor, documents: VarlenMetadata, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention_within_documents(q, k, v, documents.cu_seq_q, scale)


def swaps(model: nn.Module) -> list[Swap]:
    """Whatever attention the model's configuration chose. A flex model also has to hand out our masks."""
    masked = with_document_masks(type(model)) if _masks_are_documents(model) else None

    def other_masks(module: nn.Module) -> str | None:
        return None if masked else "its masks are neither causal nor document masks"

    found = [
        Swap(ScaledDotProductAttentionWrapper, FlashMoEAttention),
        Swap(VarlenAttentionWrapper, FlashMoEVarlenAttention),
        Swap(FlexAttentionWrapper, FlashMoEDocumentAttention, other_masks),
    ]
    return [*found, Swap(type(model), masked)] if masked else found


def _masks_are_documents(model: nn.Module) -> bool:
    arguments = getattr(model, "model_args", None)
    family = type(model).__module__.removeprefix("torchtitan.models.").split(".")[0]
    return (
        family in ("llama3", "deepseek_v3", "qwen3")
        and getattr(arguments, "attn_type", None) == "flex"
        and getattr(arguments, "attn_mask_type", None) in ("causal", "block_causal")
    )
