"""`swap`: our parts in a layer specification that Megatron, or the user's own script, has built."""

import copy
import functools
from typing import Any, get_args

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import Sharing
from flashmoe_train.schema import Choice
from flashmoe_train.swap import Report, Row


def swap(
    spec: Any,
    config: Any,
    *,
    attention: Choice = "flashmoe",
    moe: Choice = "flashmoe",
    dispatch: Choice = "stock",
    dispatch_tokens: int | None = None,
) -> Any:
    """A copy of `spec` with our attention, mixture-of-experts layers and, where stock's does not run, norms in it.

    Args:
        spec: what a GPTModel takes as `transformer_layer_spec`: a layer's specification, or a block's
            (TransformerBlockSubmodules), by `get_gpt_layer_local_spec`, `get_gpt_decoder_block_spec` or a script.
        config: the TransformerConfig that the model will have.
        attention: "stock" leaves core attention alone.
        moe: "stock" leaves mixture-of-experts layers alone; dense layers have none.
        dispatch: "flashmoe" has processes that share experts exchange tokens by our exchange, with room for all that
            can come; otherwise Megatron's dispatcher does.
        dispatch_tokens: the most tokens that a process takes through a layer at once, for our exchange: those of a
            micro-batch, divided by tensor parallelism. None: as many as the first call brings.

    Returns:
        A specification of the same kind; with sequence parallelism one of a block, which also says what the final norm
        is.

    Raises UsageError if the configuration asks for what our parts do not compute, the specification is of another kind,
    or nothing in it could be swapped. Megatron's defects that would be in the way are worked around (`compat`).
    """
    for name, choice in (("attention", attention), ("moe", moe), ("dispatch", dispatch)):
        if choice not in get_args(Choice):
            raise UsageError(f"{name} must be one of {', '.join(map(repr, get_args(Choice)))}, found {choice!r}")
    if dispatch == "flashmoe" and moe == "stock":
        raise UsageError('dispatch = "flashmoe" hands tokens to our experts: it needs moe = "flashmoe", found "stock"')
    if dispatch_tokens is not None and (dispatch_tokens < 1 or dispatch == "stock"):
        raise UsageError(
            'dispatch_tokens must be at least 1, and is for dispatch = "flashmoe", found '
            f'{dispatch_tokens} with dispatch = "{dispatch}"'
        )
    sharing = Sharing(dispatch_tokens, None) if dispatch == "flashmoe" else None
    return swapped(spec, config, attention, moe, sharing)


def swapped(spec: Any, config: Any, attention: Choice, moe: Choice, sharing: Sharing | None) -> Any:
    """`swap`, for whoever knows how processes share experts."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from flashmoe_train.integrations.megatron import compat
    from flashmoe_train.integrations.megatron.norm import Norm

    compat.apply()
    spec = copy.deepcopy(spec)  # one layer's specification often stands for all of them, and other models'
    is_block = isinstance(spec, TransformerBlockSubmodules)
    layers = {id(layer): layer for layer in (spec.layer_specs if is_block else [spec])}.values()
    count = 0
    for layer in layers:
        parts = _submodules(layer)
        if not hasattr(parts, "self_attention"):
            raise UsageError(f"swap takes a transformer layer's specification or a block's, found {_name(layer)}")
        if config.sequence_parallel:
            _use_norm(parts)
        if attention == "flashmoe":
            count += _swap_attention(parts, config)
        if moe == "flashmoe":
            count += _swap_moe(parts, config, sharing)
    if not count and "flashmoe" in (attention, moe):
        raise UsageError("nothing was swapped: the specification has no core_attention, and no MoELayer if it is dense")
    if config.sequence_parallel:
        if not is_block:
            spec = TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config))
        spec.layer_norm = Norm
    return spec


def report(model: Any) -> Report:
    """What of a built model is ours."""
    rows = [
        Row(name, module.takes_place_of, type(module).__name__, "")
        for name, module in model.named_modules()
        if hasattr(module, "takes_place_of")
    ]
    return Report(rows)


def _submodules(spec: Any) -> Any:
    """Of a ModuleSpec, or of a functools.partial, which Megatron's main branch has in its place."""
    if isinstance(spec, functools.partial):
        return spec.keywords.get("submodules")
    return getattr(spec, "submodules", None)


def _module(spec: Any) -> Any:
    return spec.func if isinstance(spec, functools.partial) else getattr(spec, "module", spec)


def _name(spec: Any) -> str:
    module = _module(spec)
    return getattr(module, "__name__", type(module).__name__)


def _use_norm(parts: Any) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from flashmoe_train.integrations.megatron.norm import Norm

    attention = _submodules(parts.self_attention)
    for owner in (parts, attention):
        for key, norm in vars(owner).items():
            if norm is WrappedTorchNorm:
                setattr(owner, key, Norm)


def _swap_attention(parts: Any, config: Any) -> int:
    from flashmoe_train.integrations.megatron import checks
    from flashmoe_train.integrations.megatron.attention import FlashMoEAttention

    checks.attention(config)
    attention = _submodules(parts.self_attention)
    if attention is None or not hasattr(attention, "core_attention"):
        return 0
    attention.core_attention = FlashMoEAttention
    return 1


def _swap_moe(parts: Any, config: Any, sharing: Sharing | None) -> int:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from flashmoe_train.integrations.megatron import checks
    from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
    from flashmoe_train.integrations.megatron.layer import FlashMoELayer

    if _module(parts.mlp) is not MoELayer:
        return 0
    checks.experts(config)
    given = {}
    if sharing is not None and config.expert_model_parallel_size > 1:
        checks.dispatch(config)
        given = {"sharing": sharing}
    _submodules(parts.mlp).experts = FlashMoEExperts
    if isinstance(parts.mlp, functools.partial):
        parts.mlp = functools.partial(FlashMoELayer, *parts.mlp.args, **{**parts.mlp.keywords, **given})
    else:
        parts.mlp.module = FlashMoELayer
        parts.mlp.params = {**parts.mlp.params, **given}
    return 1
