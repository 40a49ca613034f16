"""`flashmoe_train.swap(model)` for Megatron models that are built already: modules are replaced, values stay.

Core attention has no parameters. Experts get three tensors instead of two for each of them, so it comes before anything
that holds on to parameters: data parallelism, an optimizer.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import experts as stock_experts
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn
from torch.distributed.tensor import DTensor

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import checks, compat, installed
from flashmoe_train.integrations.megatron.attention import FlashMoEAttention
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
from flashmoe_train.integrations.megatron.layer import FlashMoELayer
from flashmoe_train.swap import Report, Row

_GROUPED = getattr(stock_experts, "GroupedMLP", None)  # later versions have none
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def swap_model(model: nn.Module, parts: set[str], dry_run: bool) -> Report:
    """Swaps core attention and mixture-of-experts layers, as far as they are among `parts`, of a Megatron model.

    Raises UsageError if something holds on to the model's parameters already.
    """
    installed.check()
    _check_order(model, "swap comes before")
    report = Report(planned=dry_run)
    if not dry_run:
        compat.apply()
    for name, module in list(model.named_modules()):
        if "attention" in parts:
            for child, core in module.named_children():
                if isinstance(core, DotProductAttention | FlashMoEAttention):
                    _swap_attention(f"{name}.{child}".lstrip("."), module, child, core, report)
        if "experts" in parts and isinstance(module, MoELayer):
            _swap_layer(name, module, report)
    return report


def _check_order(module: nn.Module, what: str) -> None:
    for name, parameter in module.named_parameters():
        for mark in ("main_grad", "main_param"):
            if hasattr(parameter, mark):
                raise UsageError(
                    f"{what} data parallelism and the optimizer, which hold on to parameters: {name} has a {mark}"
                )
        if isinstance(parameter, DTensor):
            raise UsageError(f"{what} parameters are shared by processes: {name} is a DTensor")


def _swap_attention(name: str, owner: nn.Module, child: str, stock: Any, report: Report) -> None:
    reason = _why_not(stock, FlashMoEAttention, DotProductAttention)
    if reason is None:
        reason = _refused(lambda: checks.attention(stock.config, stock.attention_dropout.p)) or _hooked(stock)
    report.rows.append(Row(name, type(stock).__name__, None if reason else FlashMoEAttention.__name__, reason or ""))
    if reason is not None or report.planned:
        return
    ours = FlashMoEAttention(
        stock.config, stock.layer_number, stock.attn_mask_type, stock.attention_type, stock.attention_dropout.p
    )
    given = stock.config.apply_query_key_layer_scaling
    ours.softmax_scale = stock.softmax_scale * (stock.layer_number if given else 1)
    setattr(owner, child, ours.train(stock.training))
    report.undo.append(lambda: setattr(owner, child, stock))


def _swap_layer(name: str, layer: Any, report: Report) -> None:
    stock = layer.experts
    reason = _why_not(layer, FlashMoELayer, MoELayer)
    if reason is None:
        reason = _refused(lambda: checks.experts(layer.config)) or _experts_why_not(stock) or _hooked(stock)
    report.rows.append(Row(name, type(layer).__name__, None if reason else FlashMoELayer.__name__, reason or ""))
    if reason is not None:
        return
    report.rows.append(Row(f"{name}.experts", type(stock).__name__, FlashMoEExperts.__name__, ""))
    if report.planned:
        return
    dispatcher = layer.token_dispatcher
    groups = SimpleNamespace(
        ep=dispatcher.ep_group, expt_tp=dispatcher.tp_group, tp_ep=dispatcher.tp_ep_group, expt_dp=stock.dp_group
    )
    layer.experts = _experts(stock, layer.config, groups)
    layer.experts.layer = str(layer.layer_number)
    layer.__class__ = FlashMoELayer
    layer.use_own_dispatcher(groups)
    shapes = [parameter.shape for parameter in stock.parameters()]
    for parameter in stock.parameters():  # they would take as much memory again
        parameter.data, parameter.grad = parameter.data.new_empty(0), None

    def revert() -> None:
        _check_order(layer.experts, "revert comes before")
        for parameter, shape in zip(stock.parameters(), shapes, strict=True):
            parameter.data = layer.experts.w1.data.new_empty(shape)
        _copy_back(layer.experts, stock)
        layer.experts, layer.token_dispatcher, layer.__class__ = stock, dispatcher, MoELayer

    report.undo.append(revert)


def _why_not(module: nn.Module, ours: type, target: type) -> str | None:
    if type(module) is target:
        return None
    return "swapped already" if type(module) is ours else "a class derived from what is swapped"


def _refused(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UsageError as error:
        return str(error)
    return None


def _hooked(module: nn.Module) -> str | None:
    for part in module.modules():
        if any(getattr(part, hooks) for hooks in _HOOKS):
            return f"hooks are registered on its {type(part).__name__}, which would not be called"
    return None


def _experts_why_not(experts: Any) -> str | None:
    """None if these experts are ours to compute, else the reason why not."""
    if type(experts) not in (SequentialMLP, _GROUPED):
        return f"its experts are a {type(experts).__name__}, not a SequentialMLP or GroupedMLP"
    if type(experts) is SequentialMLP:
        linear = {"linear_fc1": ColumnParallelLinear, "linear_fc2": RowParallelLinear}
        for expert in experts.local_experts:
            kinds = [(expert, MLP), *((getattr(expert, part), kind) for part, kind in linear.items())]
            for part, kind in kinds:
                if type(part) is not kind:
                    return f"an expert has a {type(part).__name__} where a {kind.__name__} is stock's"
    if len({parameter.requires_grad for parameter in experts.parameters()}) > 1:
        return "some of its experts' weights are frozen, and some are not"
    return None


@torch.no_grad()
def _experts(stock: Any, config: Any, groups: Any) -> FlashMoEExperts:
    """Ours with the weights of `stock`; no random number is drawn."""
    first = next(stock.parameters())
    given = copy.copy(config)
    given.perform_initialization = False
    ours = FlashMoEExperts(stock.num_local_experts, given, pg_collection=groups)
    ours.config = config
    ours.to(first.device, first.dtype).requires_grad_(first.requires_grad).train(stock.training)
    if isinstance(stock, SequentialMLP):
        ours.load_state_dict(stock.state_dict())
    else:
        both, down = (w.view(ours.num_local_experts, *shape).mT for w, shape in _grouped(stock, ours))
        for own, weight in zip((ours.w1, ours.w3, ours.w2), (*both.chunk(2, 1), down), strict=True):
            own.copy_(weight)
    return ours


@torch.no_grad()
def _copy_back(ours: FlashMoEExperts, stock: Any) -> None:
    if isinstance(stock, SequentialMLP):
        stock.load_state_dict(ours.state_dict())
    else:
        both = torch.cat([ours.w1, ours.w3], 1)
        for (weight, shape), own in zip(_grouped(stock, ours), (both, ours.w2), strict=True):
            weight.view(ours.num_local_experts, *shape).copy_(own.mT)


def _grouped(stock: Any, ours: FlashMoEExperts) -> tuple[tuple[Any, tuple[int, int]], ...]:
    """GroupedMLP's two tensors, and what each has for an expert: the transposes of SequentialMLP's weights."""
    _, hidden, dim = ours.w1.shape
    return (stock.weight1, (dim, 2 * hidden)), (stock.weight2, (hidden, dim))
