"""Direct calls of `torch.nn.functional.scaled_dot_product_attention`, by `flashmoe_train.attention`.

    with flashmoe_train.swap_sdpa():
        out = model(x)

    @flashmoe_train.swap_sdpa()
    def forward(self, x): ...

A mask says which keys each query sees; what our operator takes is a band, packed documents, or padding of keys. Which
of them a mask is, if any, is found by building that from a few numbers and comparing: nothing is taken on trust.

Shape legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

import contextlib
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from flashmoe_train.errors import UsageError
from flashmoe_train.ops.attention import attention
from flashmoe_train.ops.library import compute_dtype

Refused = Literal["error", "stock"]


class Visible(NamedTuple):
    """What of a mask `flashmoe_train.attention` is told."""

    window: tuple[int | None, int | None] = (None, None)
    cu_seqlens_q: Tensor | None = None  # of the B · S queries and B · T keys in a row
    cu_seqlens_k: Tensor | None = None


class swap_sdpa(TorchFunctionMode, contextlib.ContextDecorator):
    """Inside, `scaled_dot_product_attention` is computed by `flashmoe_train.attention`: a context manager, or with
    parentheses a decorator.

    Causal and full attention, grouped queries, and masks that are a band, packed documents or padding of keys, boolean
    or of 0 and -inf. A mask tensor is analysed once, which makes the host wait for the device; what changes or makes
    masks in every layer pays for it in every layer. `refused` says what becomes of calls that cannot be expressed, such
    as those with dropout or other masks: "error", a UsageError that says why, or "stock", PyTorch's own with a warning.
    Calls in `torch.nn.MultiheadAttention` are out of its reach: `flashmoe_train.swap` is for those. Under activation
    checkpointing decorate what is checkpointed, since that runs again in backward.
    """

    def __init__(self, refused: Refused = "error") -> None:
        if refused not in get_args(Refused):
            raise UsageError(f"refused must be one of {', '.join(map(repr, get_args(Refused)))}, found {refused!r}")
        super().__init__()
        self._refused = refused

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        found = _attention(*args, **kwargs)
        if not isinstance(found, str):
            return found
        if not found:
            return func(*args, **kwargs)
        if self._refused == "error":
            raise UsageError(f"scaled_dot_product_attention cannot be swapped: {found}")
        _warn(found)
        return func(*args, **kwargs)


@torch.compiler.assume_constant_result
def _warn(reason: str) -> bool:
    warnings.warn(f"scaled_dot_product_attention is computed by PyTorch: {reason}", stacklevel=4)
    return True


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | str:
    """The result `[B, H, S, V]`, or why there is none, `""` where PyTorch itself says what is wrong."""
    if query.is_nested or {query.dim(), key.dim(), value.dim()} != {4}:
        return "it takes tensors of [batch, heads, sequence, head_dim]"
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or query.shape[3] != key.shape[3]:
        return "query, key and value do not have one batch, and one head_dim, without broadcasting"
    if not (heads and key.shape[1]) or heads % key.shape[1] or (heads != key.shape[1] and not enable_gqa):
        gqa = "with" if enable_gqa else "without"
        return f"there are {heads} heads of queries and {key.shape[1]} of keys, {gqa} enable_gqa"
    dtype = compute_dtype(query)
    if any(not x.is_floating_point() or compute_dtype(x) != dtype for x in (query, key, value)):
        return ""
    if dropout_p:
        return f"dropout_p is {dropout_p}, and our operator has no dropout"
    visible: Visible | str = Visible()
    if attn_mask is not None and is_causal:
        return "attn_mask and is_causal are both given"
    if attn_mask is not None:
        if not fits(attn_mask, query) or not _broadcasts(attn_mask.shape, (batch, heads, queries, keys)):
            return ""
        visible = seen(attn_mask, batch, queries, keys)
    elif is_causal and keys > queries:  # aligned to the top left, so that nobody sees the last keys
        key, value, visible = key[:, :, :queries], value[:, :, :queries], Visible((None, 0))
    elif is_causal:
        visible = Visible((None, queries - keys))
    if isinstance(visible, str):
        return visible
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return attend(q, k, v, visible, scale).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float | None = None) -> Tensor:
    """`flashmoe_train.attention` of `[B, S, H, D]` within what is visible."""
    window, bounds_q, bounds_k = visible
    if bounds_q is None:
        return attention(q, k, v, window=window, softmax_scale=scale)
    packed = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    out = attention(*packed, window=window, softmax_scale=scale, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)
    return out.view(*q.shape[:3], v.shape[3])


# ---------------------------------------------------------------------------------------------------------------- masks

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by mask: (its version and how it is used, what it is)


def fits(mask: Tensor, query: Tensor) -> bool:
    """Whether PyTorch takes a mask of this dtype beside `query`, after what autocast makes of both."""
    if mask.device != query.device:  # not left to PyTorch, which reads garbage from a mask on "meta"
        raise ValueError(
            f"query and its mask must be on one device, found query on {query.device} and the mask on {mask.device}"
        )
    if mask.is_floating_point():
        return compute_dtype(mask) in (torch.float32, compute_dtype(query))
    return mask.dtype == torch.bool


def _broadcasts(shape: tuple[int, ...], to: tuple[int, int, int, int]) -> bool:
    return 2 <= len(shape) <= 4 and all(n in (1, m) for n, m in zip(shape, to[-len(shape) :], strict=True))


def seen(
    mask: Tensor, batch: int, queries: int, keys: int, *, of: Tensor | None = None, hides: bool = False
) -> Visible | str:
    """`analyse`, once for every mask, or tensor `of` which it is a view, until it changes. A boolean mask that `hides`
    is True where nothing is seen."""
    if torch.compiler.is_compiling():
        return "attn_mask cannot be looked at while compiling: is_causal=True need not be"
    if mask.requires_grad:
        return "attn_mask requires gradients, and our operator has no bias"
    if mask.is_meta:
        return "attn_mask is on the meta device, where it has no values"
    use = (None if mask.is_inference() else mask._version, batch, queries, keys, hides)
    of = mask if of is None else of
    known = _known.get(of)
    if known is None or known[0] != use or use[0] is None:
        known = (use, analyse(~mask if hides and mask.dtype == torch.bool else mask, batch, queries, keys))
        _known[of] = known
    return known[1]


@torch.no_grad()
def analyse(mask: Tensor, batch: int, queries: int, keys: int) -> Visible | str:
    """What `mask`, of a shape that broadcasts to `[B, H, S, T]`, boolean or additive, tells queries to see; or why it
    is nothing that `flashmoe_train.attention` can be told."""
    if 0 in (batch, queries, keys):
        return Visible()  # nobody sees anything
    mask = mask[(None,) * (4 - mask.dim())]
    seen = mask if mask.dtype == torch.bool else mask == 0
    binary = mask.new_ones((), dtype=torch.bool) if mask.dtype == torch.bool else (seen | (mask == -torch.inf)).all()
    one_for_heads = (seen == seen[:, :1]).all()
    seen = seen[:, 0].expand(-1, queries, keys)  # [1 or B, S, T]
    place, other = (torch.arange(n, device=mask.device, dtype=torch.int32) for n in (queries, keys))
    distance = other - (place[:, None] + keys - queries)
    nobody = -queries - keys
    right, left = (torch.where(seen, d, nobody).amax() for d in (distance, -distance))
    in_band = (distance <= right) & (distance >= -left)
    facts = [binary, one_for_heads, left, right, (seen == in_band).all()]
    # Keys that are seen by every query or by none.
    of_keys = seen[:, :1]
    runs = (of_keys & ~F.pad(of_keys, (1, 0))[..., :-1]).sum(-1)
    facts.append((seen == of_keys).all() & (runs <= 1).all())
    begins = None
    if queries == keys:
        near = seen.diagonal(-1, 1, 2) | seen.diagonal(1, 1, 2)
        begins = F.pad(~near, (1, 0), value=True)  # [1 or B, S]
        document = begins.cumsum(1)
        facts.append((seen == (in_band & (document[:, :, None] == document[:, None]))).all())
    binary, one_for_heads, left, right, is_band, is_padding, *is_packed = torch.stack(
        [x.long() for x in facts]
    ).tolist()
    if not binary:
        return "attn_mask has values other than 0 and -inf, and our operator has no bias"
    if not one_for_heads:
        return "attn_mask is another for other heads"
    bounded = _window(left, right, queries, keys)
    if is_band and isinstance(bounded, tuple):
        return Visible(bounded)
    if is_padding:
        return Visible((None, None), *_padding(of_keys[:, 0].expand(batch, keys), queries))
    if is_packed and is_packed[0] and begins is not None and isinstance(bounded, tuple):
        bounds = F.pad(begins.expand(batch, queries).flatten(), (0, 1), value=True).nonzero().flatten().int()
        return Visible(bounded, bounds, bounds)
    return (
        bounded if is_band and isinstance(bounded, str) else "attn_mask is no band, no documents and no padding of keys"
    )


def _window(left: int, right: int, queries: int, keys: int) -> tuple[int | None, int | None] | str:
    """None where the whole sequence is seen; our operator's windows contain the token itself."""
    if left < 0 or right < 0:
        return "attn_mask hides a token from itself"
    return None if left >= keys - 1 else left, None if right >= queries - 1 else right


def _padding(seen: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Bounds for `[B, T]` keys: every sequence's queries with what is seen, before it hidden keys without queries, and
    after it too."""
    batch, keys = seen.shape
    row = torch.arange(batch, device=seen.device)
    first, count = row * keys + seen.int().argmax(1), seen.sum(1)
    starts_q = torch.stack([row * queries, row * queries, (row + 1) * queries], 1)
    starts_k = torch.stack([row * keys, first, first + count], 1)
    ends = ((batch * queries,), (batch * keys,))
    bounds = [
        torch.cat([starts.flatten(), starts.new_tensor(end)]).int()
        for starts, end in zip((starts_q, starts_k), ends, strict=True)
    ]
    return bounds[0], bounds[1]
