"""PyTorch's own modules, for `flashmoe_train.swap`: `torch.nn.MultiheadAttention`, and those that hold it.

`torch.nn.TransformerDecoderLayer` calls its attention and needs nothing else. `TransformerEncoderLayer` does so while
it trains; in `eval()` without gradients it would run a kernel of PyTorch that reads the weights itself, so it is
swapped too.

Shape legend: B batch, S queries, T keys, E embedding dim, H heads, D = E / H.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmoe_train.integrations.sdpa import Visible, attend, fits, seen
from flashmoe_train.swap import swap


@torch.compiler.assume_constant_result
def _warn(reason: str) -> bool:
    """Once for each reason, as Python's filters have it; when the call is compiled, while it is."""
    warnings.warn(f"MultiheadAttention is computed by PyTorch: {reason}", stacklevel=3)
    return True


def _why_not(module: nn.Module) -> str | None:
    assert isinstance(module, nn.MultiheadAttention)
    if module.dropout:
        return f"its attention dropout is {module.dropout}, and our operator has none"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn add keys that have no position"
    return None


@swap.register(nn.MultiheadAttention, _why_not, part="attention")
class FlashMoEMultiheadAttention(nn.MultiheadAttention):
    """Full and causal attention by `flashmoe_train.attention`, and masks that it can express (see
    `flashmoe_train.swap_sdpa`). Other calls go to PyTorch, with a warning that says why: those that ask for the weights
    (`need_weights`, PyTorch's default!) and other masks."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`; `is_causal` says that `attn_mask` is the causal mask."""
        batched = query.dim() == 3
        batch = 0 if self.batch_first else 1  # which dimension it is, or would be
        length = 1 if batched and self.batch_first else 0
        ranks = {query.dim(), key.dim(), value.dim()}
        if ranks not in ({2}, {3}) or query.shape[-1] != self.embed_dim or (is_causal and attn_mask is None):
            return super().forward(query, key, value, is_causal=is_causal)  # which says what is wrong
        reason = None
        visible = Visible((None, 0) if is_causal else (None, None))
        if query.is_nested:
            reason = "nested tensors have no shape"
        elif self.training and self.dropout:
            reason = "dropout was switched on after the swap"
        elif need_weights:
            reason = "need_weights=True asks for the attention weights, which it never holds"
        elif attn_mask is not None and key_padding_mask is not None:
            reason = "attn_mask and key_padding_mask together are neither a band nor documents"
        elif key_padding_mask is not None or (attn_mask is not None and not is_causal):
            sizes = (query.shape[batch] if batched else 1, query.shape[length], key.shape[length])
            found = _visible(query, attn_mask, key_padding_mask, self.num_heads, *sizes)
            reason, visible = (found, visible) if isinstance(found, str) else (None, found)
        elif is_causal and query.shape[length] != key.shape[length]:
            reason = "is_causal with as many queries as keys alone means the same to both"
        if reason is not None:
            if reason:
                _warn(reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._project(query, key, value)
        q, k, v = (x if batched else x.unsqueeze(batch) for x in (q, k, v))
        q, k, v = (x.transpose(0, batch).unflatten(2, (self.num_heads, self.head_dim)) for x in (q, k, v))
        out = attend(q, k, v, visible).flatten(2).transpose(0, batch)  # inside: [B, S, H, D]
        return self.out_proj(out if batched else out.squeeze(batch)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:  # keys and values have dims of their own
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _visible(
    query: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    heads: int,
    batch: int,
    queries: int,
    keys: int,
) -> Visible | str:
    """What one of the masks, which are True where nothing is seen, lets be seen; or why it cannot be said, `""` where
    PyTorch itself says what is wrong."""
    given = key_padding_mask if attn_mask is None else attn_mask
    assert given is not None
    wanted: list[list[int]] = [[queries, keys], [batch * heads, queries, keys]]
    if attn_mask is None:
        wanted = [[batch, keys] if query.dim() == 3 else [keys]]
    # Of empty ones PyTorch takes some and refuses others.
    if not fits(given, query) or list(given.shape) not in wanted or 0 in (batch, queries, keys):
        return ""
    if attn_mask is None:
        mask = given.view(batch, 1, 1, keys)
    else:
        mask = given if given.dim() == 2 else given.unflatten(0, (batch, heads))
    return seen(mask, batch, queries, keys, of=given, hides=True)


def _layer_why_not(module: nn.Module) -> str | None:
    assert isinstance(module, nn.TransformerEncoderLayer)
    if type(module.self_attn) not in (nn.MultiheadAttention, FlashMoEMultiheadAttention):
        return f"its attention is a {type(module.self_attn).__name__}"
    reason = _why_not(module.self_attn)
    return reason and f"its attention is left alone: {reason}"


@swap.register(nn.TransformerEncoderLayer, _layer_why_not, part="attention")
class FlashMoETransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Always calls its attention, whatever PyTorch would do in inference: on a nested tensor still that, which
    `torch.nn.TransformerEncoder` makes of padding there, with a warning."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `torch.nn.TransformerEncoderLayer.forward`."""
        if src.is_nested:
            _warn("nested tensors have no shape")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        block = partial(self._sa_block, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        if self.norm_first:
            src = src + block(self.norm1(src))
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + block(src))
        return self.norm2(src + self._ff_block(src))
