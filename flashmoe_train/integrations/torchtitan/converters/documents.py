"""Document masks without flex attention: where documents begin and end, instead of a block mask.

TorchTitan asks the model for the masks of each batch and hands them to every layer, which insist on a BlockMask. Ours
is one in name only: it carries `cu_seqlens`, so no mask is computed, and none is compiled. Its length is the number of
documents, and to ask a GPU for that is to wait for it: our trainer asks while the batch is on the host (`send`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.attention import VarlenMetadata, create_varlen_metadata_for_document


class DocumentMask(BlockMask):
    """Causal attention within `documents`, or within each sequence if that is None."""

    def __init__(self, documents: VarlenMetadata | None) -> None:
        self.documents = documents  # BlockMask's own attributes would be the blocks that are never computed

    def __repr__(self) -> str:
        return f"DocumentMask({self.documents})"

    def to(self, device: torch.device | str) -> "DocumentMask":
        if self.documents is None:
            return self
        ends = sent(self.documents.cu_seq_q, torch.device(device))
        return DocumentMask(self.documents._replace(cu_seq_q=ends, cu_seq_k=ends))


class DocumentMasks:
    """Of a model whose masks are `DocumentMask`s."""

    def get_attention_masks(self: Any, input_batch: Tensor, tokenizer: Any, extra_inputs: Any = None) -> DocumentMask:
        """A document ends with the tokenizer's end-of-sequence token and at the end of its row, as in stock."""
        if (known := getattr(input_batch, "documents", None)) is not None:
            return known
        if self.model_args.attn_mask_type == "causal":
            return DocumentMask(None)
        return DocumentMask(create_varlen_metadata_for_document(input_batch, tokenizer.eos_id))


def with_document_masks(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a TorchTitan model whose masks are `DocumentMask`s."""
    return type(f"FlashMoE{model_class.__name__}", (DocumentMasks, model_class), {})


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on its way to `device`: nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send(tokens: Tensor, model: nn.Module, tokenizer: Any, device: torch.device) -> Tensor:
    """A batch of the host's `tokens`, which on the device knows its documents if `model` asks for them."""
    moved = sent(tokens, device)
    if isinstance(model, DocumentMasks):
        moved.documents = model.get_attention_masks(tokens, tokenizer).to(device)  # type: ignore[attr-defined]
    return moved
