"""Implementations that may be installed beside us, each by a few lines: FlashAttention 3 and 4, TransformerEngine and
SonicMoE. What is missing, or does not import, raises Unavailable."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashmoe_train.bench.attention_cases import Case, Documents, Forward
from flashmoe_train.bench.measure import Unavailable
from flashmoe_train.bench.moe_cases import Inputs, Layer


def import_peer(name: str) -> ModuleType:
    try:
        return import_module(name)
    except Exception as error:  # a binary for another PyTorch fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            raise Unavailable("not installed") from None
        raise Unavailable(f"cannot be imported: {(str(error).splitlines() or [repr(error)])[0]}") from None


# ----------------------------------------------------------------------------------------------------------- attention


def fa3_attention(case: Case, documents: Documents | None) -> Forward:
    """FlashAttention-3: its own front where that is installed, otherwise its bare operators."""
    try:
        return _dao_attention(import_peer("flash_attn_interface"), case, documents)
    except Unavailable as reason:
        if str(reason) != "not installed":
            raise
    import_peer("flash_attn_3._C")  # registers torch.ops.flash_attn_3
    mask: dict[str, Any] = {"softmax_scale": case.d**-0.5, "is_causal": case.causal}
    if documents is not None:
        mask |= {"cu_seqlens_q": documents.cu_seqlens, "cu_seqlens_k": documents.cu_seqlens}
        mask |= {"max_seqlen_q": documents.longest, "max_seqlen_k": documents.longest}
    return _packed(lambda q, k, v: _FlashAttention3.apply(q, k, v, mask), documents)


def fa4_attention(case: Case, documents: Documents | None) -> Forward:
    """FlashAttention-4 (CuTe DSL), by its path for Hopper."""
    return _dao_attention(import_peer("flash_attn.cute"), case, documents)


def te_attention(case: Case, documents: Documents | None) -> Forward:
    te = import_peer("transformer_engine.pytorch")
    if documents is not None:
        raise Unavailable("no adapter for packed documents")
    dims = case.d if case.d == case.dv else (case.d, case.dv)
    mask = "causal" if case.causal else "no_mask"
    layer = te.DotProductAttention(
        case.h, dims, num_gqa_groups=case.h_kv, attention_dropout=0.0, qkv_format="bshd", attn_mask_type=mask
    )
    return lambda q, k, v: layer(q, k, v).unflatten(-1, (case.h, case.dv))  # it merges the heads


def _dao_attention(module: ModuleType, case: Case, documents: Documents | None) -> Forward:
    """The functions that FlashAttention 3 and 4 have in common; some versions return the log-sum-exp too."""
    if documents is None:
        return lambda q, k, v: _first(module.flash_attn_func(q, k, v, causal=case.causal))
    lengths = {f"cu_seqlens_{side}": documents.cu_seqlens for side in "qk"}
    longest = {f"max_seqlen_{side}": documents.longest for side in "qk"}
    return _packed(
        lambda q, k, v: _first(module.flash_attn_varlen_func(q, k, v, **lengths, **longest, causal=case.causal)),
        documents,
    )


def _packed(forward: Callable[[Tensor, Tensor, Tensor], Any], documents: Documents | None) -> Forward:
    """Packed documents have no batch dimension there."""
    if documents is None:
        return forward
    return lambda q, k, v: forward(q.squeeze(0), k.squeeze(0), v.squeeze(0)).unsqueeze(0)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


class _FlashAttention3(torch.autograd.Function):
    """Autograd around FlashAttention-3's operators, which have none."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: dict[str, Any]) -> Tensor:
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **mask, num_splits=1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn_3.bwd(douts[0], q, k, v, out, lse, *grads, **ctx.mask)
        return *grads, None


# -------------------------------------------------------------------------------------------------- mixture of experts


def sonicmoe_layer(inputs: Inputs) -> Layer:
    """SonicMoE for a routing that is given, in the weight layout of its own benchmarks: gate and up rows in turns."""
    sonicmoe = import_peer("sonicmoe")
    swiglu = import_peer("sonicmoe.enums").ActivationType.SWIGLU
    x, w1, w2, w3, ids, weights = inputs
    training = x.requires_grad
    w13 = torch.stack([w1.detach(), w3.detach()], 2).flatten(1, 2).requires_grad_(training)  # [E, 2n, d]
    token = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device).repeat_interleave(ids.shape[1])
    stream = torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        return sonicmoe.moe_general_routing_inputs(
            x, weights.reshape(-1), token, ids.reshape(-1), w13.permute(1, 2, 0), None, w2.permute(1, 2, 0), None,
            w1.shape[0], stream, swiglu, is_inference_mode_enabled=not training,
        )[0]  # fmt: skip

    def gradients(dx: Tensor, dw13: Tensor, dw2: Tensor, dweights: Tensor) -> tuple[Tensor, ...]:
        return dx, dw13[:, ::2], dw2, dw13[:, 1::2], dweights

    return Layer(forward, (x, w13, w2, weights), gradients)
