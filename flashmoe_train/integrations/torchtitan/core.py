"""What TorchTitan's modules compute with our operators, whichever generation of it they belong to.

Shape legend: B batch, S sequence, H heads, D dim of queries and keys, V of values, T tokens, K experts per token,
E experts, R rows.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.ops import expert_parallel
from flashmoe_train.ops.attention import attention
from flashmoe_train.ops.library import compute_dtype
from flashmoe_train.ops.moe import moe, moe_rows

# What selective activation checkpointing is to keep. The second is what attention's fallback runs on documents.
ATTENTION_OPERATORS = (
    torch.ops.flashmoe.attention_forward.default,
    torch.ops.torch_attn._varlen_attn.default,
)
MOE_OPERATORS = (
    torch.ops.flashmoe.route_plan.default,
    torch.ops.flashmoe.moe_forward.default,
    torch.ops.flashmoe.ep_forward.default,
)


def attention_within_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """Causal attention of `[B, S, H, D]` within the documents that `cu_seqlens` cuts the B · S tokens into; gives
    `[B · S, H, V]`."""
    q, k, v = (x.flatten(0, 1) for x in autocast(q, k, v))
    if isinstance(q, DTensor):
        everywhere = [Replicate()] * q.device_mesh.ndim
        cu_seqlens = DTensor.from_local(cu_seqlens, q.device_mesh, everywhere, run_check=False)
    return attention(q, k, v, causal=True, softmax_scale=scale, cu_seqlens_q=cu_seqlens)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """SDPA casts under autocast; so do we, since rotary embeddings may leave q and k wider than v."""
    return tuple(x.to(compute_dtype(x)) for x in tensors)


def routed_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, routing: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Tokens x `[T, D]`, the experts `routing` `[T, K]` of each and their `weights` `[T, K]` give `[T, D]`.

    Without weights x holds rows `[R, D]` sorted by expert and `routing` how many each expert has, `[E]`: the signature
    of TorchTitan's experts, around which its parallelism exchanges rows.
    """
    dtype = compute_dtype(x)
    w1, w2, w3 = (_local(w).to(dtype) for w in (w1, w2, w3))
    if weights is not None:
        return moe(x.to(dtype), w1, w2, w3, routing, weights).type_as(x)
    ends = routing.cumsum(0, dtype=torch.int32)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return moe_rows(x.to(dtype), w1, w2, w3, offsets).type_as(x)


def experts_over_ranks(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ids: Tensor, weights: Tensor, shared: Sharing, layer: str
) -> Tensor:
    """`routed_experts` of tokens where w1, w2 and w3 are DTensors, of which each rank of their mesh has its experts.
    Where they are float32 the operator rounds them."""
    assert isinstance(w1, DTensor)
    dtype = compute_dtype(x)
    experts, group = w1.shape[0], w1.device_mesh.get_group()
    w1, w2, w3 = (w if w.dtype == torch.float32 else w.to(dtype) for w in map(_local, (w1, w2, w3)))
    exchange = shared.exchange(group, experts, x.shape[1], ids.shape[1], dtype, x.device)
    return expert_parallel.routed_experts(x.to(dtype), w1, w2, w3, ids, weights, exchange, layer).type_as(x)


def _local(w: Tensor) -> Tensor:
    return w.to_local() if isinstance(w, DTensor) else w
