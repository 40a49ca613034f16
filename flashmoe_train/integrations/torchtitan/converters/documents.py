"""Document masks without flex attention: where documents begin and end, instead of a block mask.

TorchTitan asks the model for the masks of each batch and hands them to every layer, which insist on a BlockMask. Ours
is one in name only: it carries `cu_seqlens`, so no mask is computed, and none is compiled.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.attention import VarlenMetadata, create_varlen_metadata_for_document


class DocumentMask(BlockMask):
    """Causal attention within `documents`, or within each sequence if that is None."""

    def __init__(self, documents: VarlenMetadata | None) -> None:
        self.documents = documents  # BlockMask's own attributes would be the blocks that are never computed

    def __repr__(self) -> str:
        return f"DocumentMask({self.documents})"


class _DocumentMasks:
    def get_attention_masks(self: Any, input_batch: Tensor, tokenizer: Any, extra_inputs: Any = None) -> DocumentMask:
        """A document ends with the tokenizer's end-of-sequence token and at the end of its row, as in stock."""
        if self.model_args.attn_mask_type == "causal":
            return DocumentMask(None)
        return DocumentMask(create_varlen_metadata_for_document(input_batch, tokenizer.eos_id))


def with_document_masks(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a TorchTitan model whose masks are `DocumentMask`s."""
    return type(f"FlashMoE{model_class.__name__}", (_DocumentMasks, model_class), {})
