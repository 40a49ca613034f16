"""`experts_implementation="flashmoe"`: Transformers' routed experts by `flashmoe_train.moe`.

Every class behind Transformers' `use_experts_implementation` describes itself by attributes; from them alone follows
whether its experts are the SwiGLU that our operator computes.

Shape legend: T tokens, d model dim, K experts per token, E experts, n hidden dim of an expert.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from flashmoe_train.ops.library import accumulation_dtype, compute_dtype
from flashmoe_train.ops.moe import moe


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers lets the forward of this module be replaced."""
    return all(hasattr(module, name) for name in ("has_bias", "is_transposed", "_apply_gate", "config"))


def why_not(module: Any) -> str | None:
    """None if the experts are ours to compute, else the reason why not; `module` is one of `is_experts`."""
    name = type(module).__name__
    if module.has_bias:
        return "its experts have biases"
    if not module.has_gate:
        return "its experts have no gate"
    if type(module)._apply_gate is not _default_apply_gate:
        return f"{name} has a gate of its own"
    if module.is_transposed or not module.is_concatenated:
        return "its weights are transposed or interleaved"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm"
    if not isinstance(module.act_fn, SiLUActivation | nn.SiLU):
        return f"its activation is {type(module.act_fn).__name__}, and our operator's is SiLU"
    return None


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What Transformers calls in every layer: hidden_states `[T, d]`, top_k_index and top_k_weights `[T, K]`; the
    module's `gate_up_proj` is `[E, 2n, d]`, its `down_proj` `[E, d, n]`. Returns `[T, d]` in hidden_states' dtype.

    Ids of experts of other processes, E and above, are skipped. Raises ValueError or TypeError that names the argument.
    """
    dtype = compute_dtype(hidden_states)
    # The halves are views; their gradients become one tensor again by one copy, as unbind's backward is a stack.
    gate, up = module.gate_up_proj.to(dtype).unflatten(1, (2, -1)).unbind(1)
    weights = top_k_weights.to(accumulation_dtype(dtype))
    down = module.down_proj.to(dtype)
    return moe(hidden_states.to(dtype), gate, down, up, top_k_index, weights).to(hidden_states.dtype)
