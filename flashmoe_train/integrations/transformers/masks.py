"""The masks of Transformers' causal models, as the documents and windows that `flashmoe_train.attention` takes.

A model asks for its masks once per forward and hands them to every layer; ours is a `CausalMask`, a handful of bounds
instead of `[B, 1, S, S]` booleans. What is no such mask is made by Transformers, for its own attention, and a warning
says why. Reading what a mask holds makes the host wait for the device: once per kind of mask and forward (a model with
full and sliding layers has two kinds), never in a layer, and not at all under `torch.compile`.

Shape legend: B batch, S sequence.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


class CausalMask(NamedTuple):
    """Causal attention within a window and within documents, over the B · S tokens of a batch in a row."""

    window: int | None = None  # how many keys a query sees, itself among them
    cu_seqlens_q: Tensor | None = None  # int32 [documents + 1]; None: every sequence of the batch is one document
    cu_seqlens_k: Tensor | None = None


@torch.compiler.assume_constant_result
def warn_stock(reason: str) -> bool:
    """Once for each reason, as Python's filters have it; when the call is compiled, while it is."""
    warnings.warn(f"attention is computed by Transformers' sdpa: {reason}", stacklevel=3)
    return True


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # an int; a tensor with a cache of fixed size
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> CausalMask | Tensor | None:
    """The mask function of `attn_implementation="flashmoe"`: Transformers calls it, with `attention_mask` `[B, S]`,
    True at tokens and False at padding, and with what its own mask functions take.

    Returns a CausalMask, or the mask of Transformers' `sdpa` (`[B, 1, S, T]` or None), for which `attention_forward`
    calls that. Padding has to be at the ends of a sequence: anything else goes to sdpa with a warning, and is a failed
    assertion on the device where a compiled graph cannot look.
    """
    whole = torch.compiler.is_compiling()
    reason = None
    if "allow_is_bidirectional_skip" in others:
        reason = "the mask is not causal"
    elif use_vmap:
        reason = "the mask has a function of its own"
    elif local_size != getattr(config, "sliding_window", None) and local_size is not None:
        reason = "the mask is local, and no sliding window"  # chunks
    elif q_length != kv_length:
        reason = "there are keys of a cache, as in generation"
    elif kv_offset or isinstance(q_offset, Tensor) or q_offset:
        reason = "queries or keys do not begin at position 0"
    elif attention_mask is not None and tuple(attention_mask.shape) != (batch_size, q_length):
        reason = f"attention_mask is {list(attention_mask.shape)}, not [batch, sequence] = {[batch_size, q_length]}"
    if reason is None and attention_mask is not None:
        padding = attention_mask.bool()
        runs = (padding & ~F.pad(padding, (1, 0))[:, :-1]).sum(1)  # of tokens without padding between them
        if whole:
            torch._assert_async((runs <= 1).all(), "attention_mask must have padding at the ends of sequences only")
            return CausalMask(local_size, *_padded(padding))
        tidy = (runs <= 1).all().int()
        found = (tidy + padding.all()).item()  # the one time that the host waits
        if found == 2:
            return CausalMask(local_size)
        if found == 1:
            return CausalMask(local_size, *_padded(padding))
        reason = "attention_mask has padding between tokens"
    if reason is None:
        if allow_is_causal_skip:
            return CausalMask(local_size)
        bounds = _packed(mask_function, batch_size, q_length, device, whole)
        return CausalMask(local_size, bounds, bounds)
    warn_stock(reason)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **others,
    )


def _padded(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of queries and keys that let nobody see padding, and padding see nobody: five documents a sequence.

    The padding on the left as queries without keys, as keys without queries; the tokens; the right as the left.
    """
    batch, length = padding.shape
    begin = torch.arange(batch, device=padding.device) * length
    first = begin + padding.int().argmax(1)
    last, end = first + padding.sum(1), begin + length
    bounds = [
        torch.cat([torch.stack(starts, 1).flatten(), end[-1:]]).int()
        for starts in ((begin, first, first, last, end), (begin, begin, first, last, last))
    ]
    return bounds[0], bounds[1]


def _packed(
    mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str, whole: bool
) -> Tensor | None:
    """Bounds of the documents, None if they are the sequences. Where a token cannot see the one before it, in a mask
    that is otherwise causal, a document begins: the mask's own function is asked that.

    Without reading how many there are (`whole`) there are as many as tokens, of which most are empty.
    """
    token = torch.arange(length, device=device)[None]
    row = torch.arange(batch, device=device)[:, None]
    sees = mask_function(row, torch.zeros_like(token), token, (token - 1).clamp(min=0))
    begins = (~sees | (token == 0)).expand(batch, length).flatten()
    place = torch.arange(batch * length + 1, device=device)
    if whole:
        return torch.cat([place[:-1].masked_fill(~begins, batch * length).sort().values, place[-1:]]).int()
    bounds = F.pad(begins, (0, 1), value=True).nonzero().flatten().int()
    return None if bounds.shape[0] == batch + 1 else bounds
