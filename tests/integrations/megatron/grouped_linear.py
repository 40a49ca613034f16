"""Megatron's own wrappers of TransformerEngine's grouped linear layers, whose checkpoints can be looked at without it.

Their file is read once more with a package in TransformerEngine's place that has empty classes; what they say of shards
is Megatron's code. Nothing of it can compute.
"""

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from megatron.core import utils
from megatron.core.extensions import transformer_engine as extension
from megatron.core.transformer.moe import experts as stock_experts
from packaging.version import Version
from torch import nn


class _Package(types.ModuleType):
    """Has every class and every module that is asked for."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (nn.Module,), {}) if name[0].isupper() else _Package(name)
        setattr(self, name, made)
        return made


def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `megatron.core.extensions.transformer_engine`, as if version 1.9 were installed."""
    package = _Package("transformer_engine")
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8")
    for name in names:
        monkeypatch.setitem(sys.modules, name, package if name == names[0] else _Package(name))
    package.pytorch = sys.modules[names[1]]
    stateful = {"get_extra_state": lambda self: None}  # of a layer without fp8
    package.pytorch.GroupedLinear = type("GroupedLinear", (nn.Module,), stateful)
    monkeypatch.setattr(utils, "_te_version", Version("1.9.0"))
    spec = importlib.util.spec_from_file_location("tests_transformer_engine", extension.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.HAVE_TE
    return module


def experts(module: Any, config: Any, groups: Any, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    """A TEGroupedMLP with these weights, of fc1 and fc2 for each expert, that was never initialised."""
    made = stock_experts.TEGroupedMLP.__new__(stock_experts.TEGroupedMLP)
    nn.Module.__init__(made)
    made.config, made.num_local_experts = config, len(weights)
    made.ep_group, made.tp_group = groups.ep, groups.expt_tp
    for place, kind in enumerate((module.TEColumnParallelGroupedLinear, module.TERowParallelGroupedLinear)):
        linear = kind.__new__(kind)
        nn.Module.__init__(linear)
        linear.num_gemms, linear.use_bias = len(weights), False
        linear._pg_collection, linear._tp_group = groups, groups.expt_tp
        linear.fp8, linear.fp8_calibration, linear.fp8_meta = False, False, {"fp8_checkpoint": False}
        for number, pair in enumerate(weights):
            linear.register_parameter(f"weight{number}", nn.Parameter(pair[place].detach().clone()))
        made.add_module(f"linear_fc{place + 1}", linear)
    return made
