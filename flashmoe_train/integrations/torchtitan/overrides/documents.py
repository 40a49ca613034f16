"""Where documents begin and end, in a tensor whose shape depends on the batch's alone.

TorchTitan's own list of bounds is as long as the batch has documents, and it waits for the device to learn the longest.
With that a CUDA graph would hold for the first batch only, and `torch.compile` would compile for each other number.
"""

import torch
from torch import Tensor
from torchtitan.models.common import decoder
from torchtitan.models.common.attention import VarlenMetadata

from flashmoe_train.integrations.torchtitan.overrides.spmd import untyped


def bounds(positions: Tensor) -> Tensor:
    """int32 `[B · L + 1]`: where each document begins in the batch of `positions` `[B, L]`, which are 0 where one
    does. Rows do not share documents. As many documents as the batch has tokens: those that are not there are empty
    and come last."""
    row_start = torch.arange(positions.shape[1], device=positions.device) == 0
    first = ((positions == 0) | row_start).flatten()
    tokens = first.numel()
    token = torch.arange(tokens, dtype=torch.int32, device=positions.device)
    document = torch.where(first, first.cumsum(0) - 1, tokens + 1)  # other tokens write behind the end
    return token.new_full((tokens + 2,), tokens).scatter(0, document, token)[:-1]


def metadata(positions: Tensor, *, include_host_offsets: bool = False) -> VarlenMetadata:
    """What TorchTitan's function of the same arguments gives, in shapes and numbers that are the same for every
    batch; without offsets on the host."""
    if include_host_offsets:
        raise NotImplementedError("documents' bounds stay on the device: nobody is to wait for them")
    with untyped():
        cu_seqlens = bounds(positions)
    return VarlenMetadata(cu_seqlens, cu_seqlens, max_q=positions.shape[1], max_k=positions.shape[1])


def install() -> None:
    """Lets TorchTitan's decoders describe documents by `metadata`. Their configuration has no place for this; stock
    varlen attention takes it too, empty documents and all."""
    decoder.create_varlen_metadata_for_document = metadata
