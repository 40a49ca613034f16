"""Modules over the operators, for models that are written by hand: attention, router, mixture of experts.

They hold parameters and call `flashmoe_train.attention`, `router_topk` and `flashmoe_train.moe`; there is no other
mathematics here than projections and rotary positions. They work under autocast, FSDP2, activation checkpointing and
`torch.compile(fullgraph=True)`. For expert parallelism use a framework's (`flashmoe_train.integrations`).

Shape legend: B batch, S sequence, T tokens, d model dim, H heads, G key/value heads, D head dim, E experts, n hidden
dim of an expert, K experts per token.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flashmoe_train.ops.attention import attention
from flashmoe_train.ops.attention.checks import check_window
from flashmoe_train.ops.library import accumulation_dtype, compute_dtype, no_autocast
from flashmoe_train.ops.moe import Routing, ScoreMode, moe, router_topk
from flashmoe_train.ops.moe.router import ScoreFunction

__all__ = ["Attention", "MoE", "Router"]


class Attention(nn.Module):
    """Self-attention with grouped key/value heads and rotary positions (Su et al., 2021, arXiv:2104.09864).

    Args:
        dim: d, of the tokens.
        heads: H, of the queries.
        kv_heads: G, a divisor of H; default H.
        head_dim: D, even; default d / H.
        causal: a token sees itself and what is before it.
        window: how many tokens to the left and right a token sees; None is unbounded.
        rope_theta: base of the rotary positions (the two halves of a head rotate together); None leaves them out.
        deterministic: gradients are bitwise repeatable; default `torch.are_deterministic_algorithms_enabled()`.

    Raises ValueError if heads and dims do not fit together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        window: tuple[int | None, int | None] = (None, None),
        rope_theta: float | None = 10_000.0,
        deterministic: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
            raise ValueError(f"heads must be a multiple of kv_heads, found heads = {heads}, kv_heads = {kv_heads}")
        if head_dim is None:
            if dim % heads != 0:
                raise ValueError(f"dim must be a multiple of heads, or head_dim be given, found {dim} and {heads}")
            head_dim = dim // heads
        if head_dim < 1 or (rope_theta is not None and head_dim % 2 != 0):
            raise ValueError(f"head_dim must be positive, and even for rotary positions, found {head_dim}")
        check_window(window)
        if rope_theta is not None and not 0 < rope_theta < math.inf:
            raise ValueError(f"rope_theta must be positive and finite, or None, found {rope_theta}")
        self.head_dim, self.causal, self.window, self.rope_theta = head_dim, causal, window, rope_theta
        self.deterministic = deterministic
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.wq = nn.Linear(dim, heads * head_dim, **factory)
        self.wk = nn.Linear(dim, kv_heads * head_dim, **factory)
        self.wv = nn.Linear(dim, kv_heads * head_dim, **factory)
        self.wo = nn.Linear(heads * head_dim, dim, **factory)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x `[B, S, d]` gives `[B, S, d]`. With `cu_seqlens` (int32 `[documents + 1]`, see `flashmoe_train.attention`)
        B is 1, and S is cut into documents that do not see each other.

        Raises ValueError or TypeError that names the argument.
        """
        if x.dim() != 3 or x.shape[2] != self.wq.in_features:
            raise ValueError(f"x must be [batch, seq, dim = {self.wq.in_features}], found {list(x.shape)}")
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.rope_theta is not None:
            # Scores depend on differences of positions alone, so documents need no positions of their own.
            cos, sin = _angles(x.shape[1], self.head_dim, self.rope_theta, x.device)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = attention(
            q, k, v, causal=self.causal, window=self.window, cu_seqlens_q=cu_seqlens, deterministic=self.deterministic
        )
        return self.wo(out.flatten(2))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, causal={self.causal}, window={self.window}, rope_theta={self.rope_theta}"


def _angles(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 `[S, 1, D / 2]`."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None, None] * frequency
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Router(nn.Module):
    """Chooses K of E experts for each token (`router_topk`); logits and scores are float32 whatever the tokens are.

    With `balance` a bias per expert enters the choice and not the weights; `update_bias` after each optimizer step
    raises it for experts that had fewer tokens than the mean (Wang et al., 2024, arXiv:2408.15664). For a balancing
    loss instead, use the `score_sums` and `counts` of the Routing.

    Args:
        dim: d. experts: E. top_k: K.
        score_function, renormalize, scale, groups, limited_groups: as in `flashmoe_train.ops.moe.router_topk`.
        balance: keep a bias for the choice and count the experts' tokens, both in float32.

    Raises ValueError or TypeError that names the argument if they do not fit together.
    """

    bias: Tensor | None
    tokens_per_expert: Tensor | None

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        *,
        score_function: ScoreFunction = "softmax",
        renormalize: bool = False,
        scale: float = 1.0,
        groups: int = 1,
        limited_groups: int = 1,
        balance: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.score_function, self.renormalize, self.scale = top_k, score_function, renormalize, scale
        self.groups, self.limited_groups = groups, limited_groups
        _check_sizes(dim=dim, experts=experts)
        self.weight = nn.Parameter(torch.empty(experts, dim, device=device, dtype=dtype))
        for name in ("bias", "tokens_per_expert"):
            buffer = torch.zeros(experts, device=device, dtype=torch.float32) if balance else None
            self.register_buffer(name, buffer, persistent=name == "bias")
        self._route(torch.empty(1, experts, device="meta"))  # raises now what it would raise in every forward
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # .bfloat16() and the like leave the buffers float32: counts grow beyond 65504, the bias moves by 1e-3.
        super()._apply(fn, recurse)
        for name in ("bias", "tokens_per_expert"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).float())
        return self

    def reset_parameters(self) -> None:
        """The weights as in `torch.nn.Linear`, no bias, no tokens."""
        _init_linear(self.weight)
        for buffer in (self.bias, self.tokens_per_expert):
            if buffer is not None:
                nn.init.zeros_(buffer)

    def forward(self, tokens: Tensor) -> Routing:
        """tokens `[T, d]` give weights and ids `[T, K]` and the statistics of all T as one sequence.

        Raises ValueError or TypeError that names the argument.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.weight.shape[1]:
            raise ValueError(f"tokens must be [tokens, dim = {self.weight.shape[1]}], found {list(tokens.shape)}")
        if not tokens.is_floating_point():
            raise TypeError(f"tokens must be floating point, found {tokens.dtype}")
        with no_autocast(tokens.device.type):
            wide = accumulation_dtype(tokens.dtype)
            logits = F.linear(tokens.to(wide), self.weight.to(wide))
        routing = self._route(logits, self.bias)
        if self.tokens_per_expert is not None and self.training:
            # Recomputation in activation checkpointing counts twice, for every expert alike: the update sees signs.
            with torch.no_grad():
                self.tokens_per_expert.add_(routing.counts.sum(0))
        return routing

    def _route(self, logits: Tensor, bias: Tensor | None = None) -> Routing:
        return router_topk(
            logits,
            self.top_k,
            bias=bias,
            score_function=self.score_function,
            renormalize=self.renormalize,
            scale=self.scale,
            groups=self.groups,
            limited_groups=self.limited_groups,
        )

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
        """Moves each expert's bias by `rate` towards the mean load since the last call, of all processes of `group`
        (default: all there are); then forgets the counts.

        Raises ValueError if the router was made without `balance`.
        """
        if self.bias is None or self.tokens_per_expert is None:
            raise ValueError("update_bias needs a router with balance=True")
        if dist.is_initialized():
            dist.all_reduce(self.tokens_per_expert, group=group)
        counts = self.tokens_per_expert
        self.bias.add_(torch.sign(counts.mean() - counts), alpha=rate)
        counts.zero_()

    def extra_repr(self) -> str:
        experts, dim = self.weight.shape
        return f"dim={dim}, experts={experts}, top_k={self.top_k}, score_function={self.score_function!r}"


class MoE(nn.Module):
    """A router and its SwiGLU experts: out = Σ_k weight_k · w2[e] (silu(w1[e] x) · w3[e] x), e the k-th choice.

    Args:
        dim: d. hidden_dim: n, of one expert. experts: E. top_k: K.
        score_mode: where the router weight multiplies, see `flashmoe_train.moe`.
        router: everything else that Router takes: score_function, renormalize, scale, balance, ...

    The parameters w1, w3 `[E, n, d]` and w2 `[E, d, n]` are laid out and named as TorchTitan's.
    Raises ValueError or TypeError that names the argument if they do not fit together.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        experts: int,
        top_k: int,
        *,
        score_mode: ScoreMode = "combine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        if score_mode not in get_args(ScoreMode):
            raise ValueError(f"score_mode must be one of {get_args(ScoreMode)}, found {score_mode!r}")
        self.score_mode: ScoreMode = score_mode
        _check_sizes(hidden_dim=hidden_dim)
        self.router = Router(dim, experts, top_k, device=device, dtype=dtype, **router)
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim, device=device, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert as three `torch.nn.Linear`; the router resets itself."""
        for w in (self.w1, self.w2, self.w3):
            _init_linear(w)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., d]` gives the same shape, in x's dtype. Raises ValueError or TypeError that names the argument."""
        if x.dim() == 0 or x.shape[-1] != self.w1.shape[2]:
            raise ValueError(f"x must be [..., dim = {self.w1.shape[2]}], found {list(x.shape)}")
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        routing = self.router(tokens)
        dtype = compute_dtype(x)
        w1, w2, w3 = (w.to(dtype) for w in (self.w1, self.w2, self.w3))
        out = moe(tokens.to(dtype), w1, w2, w3, routing.ids, routing.weights, score_mode=self.score_mode)
        return out.to(x.dtype).view(x.shape)

    def extra_repr(self) -> str:
        experts, hidden_dim, dim = self.w1.shape
        return f"dim={dim}, hidden_dim={hidden_dim}, experts={experts}, score_mode={self.score_mode!r}"


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")


def _init_linear(w: Tensor) -> None:
    bound = 1 / math.sqrt(w.shape[-1])
    nn.init.uniform_(w, -bound, bound)
