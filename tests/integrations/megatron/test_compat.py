"""Each of Megatron's defects that we work around: that it is there, and that it is gone.

Those that show in a running job are seen by `test_parity`: a router without TransformerEngine (moe), norms under
sequence parallelism (TP2 + SP), latent attention (mla), a resumed distributed optimizer, parameters gathered in
the next forward.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import compat
from flashmoe_train.integrations.megatron.norm import Norm
from flashmoe_train.integrations.megatron.runner import _loss

from .test_specs import config


def test_names_that_transformer_engine_would_bind() -> None:
    compat.apply()
    assert moe_utils.te_general_gemm is None and multi_latent_attention.HAVE_TE is False


def test_stock_norm_refuses_sequence_parallelism() -> None:
    given = config(tensor_model_parallel_size=2, sequence_parallel=True)
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(given, 8)
    assert isinstance(Norm(given, 8), torch.nn.RMSNorm)


def test_fsdp2_with_expert_parallelism_is_refused() -> None:
    compat.apply()
    with pytest.raises(UsageError, match="expert_model_parallel_size = 2: Megatron trains that without an error"):
        TorchFullyShardedDataParallel(SimpleNamespace(expert_model_parallel_size=2), None, None)


def _optimizer(**options: Any) -> tuple[Any, Any, Any]:
    given = config()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 4, bias=False))
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, **options)
    wrapped = DistributedDataParallel(given, settings, model)
    said = OptimizerConfig(optimizer="adam", lr=0.1, min_lr=0.0, use_distributed_optimizer=True)
    said.overlap_param_gather = options.get("overlap_param_gather", False)
    return model, wrapped, get_megatron_optimizer(said, [wrapped])


def _step(wrapped: Any, optimizer: Any) -> None:
    wrapped.zero_grad_buffer()
    wrapped(torch.ones(2, 4)).square().sum().backward()
    wrapped.finish_grad_sync()
    optimizer.step()


@pytest.mark.usefixtures("alone")
def test_optimizers_that_load_before_their_first_step() -> None:
    compat.apply()
    _, _, optimizer = _optimizer()
    with pytest.raises(AssertionError):
        optimizer.state_dict()
    compat.before_loading(optimizer)
    optimizer.state_dict()


@pytest.mark.usefixtures("alone")
def test_steps_are_each_parameters_own() -> None:
    _, wrapped, optimizer = _optimizer()
    _step(wrapped, optimizer)
    states = [state for own in compat._distributed(optimizer) for state in own.optimizer.state.values()]
    assert len(states) == 2
    shared = torch.tensor(5.0)
    for state in states:
        state["step"] = shared
    compat.after_loading(optimizer)
    _step(wrapped, optimizer)
    assert [state["step"].item() for state in states] == [6.0, 6.0]


@pytest.mark.usefixtures("alone")
def test_main_parameters_and_moments_are_loaded_by_name() -> None:
    compat.apply()
    model, wrapped, optimizer = _optimizer()
    _step(wrapped, optimizer)
    (own,) = compat._distributed(optimizer)
    parameter = model[0].weight
    shape = own._get_main_param_and_optimizer_states(parameter)["param"].shape
    own._set_main_param_and_optimizer_states(
        parameter, {name: torch.full(shape, value) for name, value in (("param", 1.0), ("exp_avg", 2.0))}
    )
    found = own._get_main_param_and_optimizer_states(parameter)
    assert (found["param"] == 1).all() and (found["exp_avg"] == 2).all() and found["step"].item() == 1


@pytest.mark.usefixtures("alone")
def test_parameters_are_complete_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wrapped, _ = _optimizer(overlap_param_gather=True, overlap_grad_reduce=True)
    gathered: list[bool] = []
    monkeypatch.setattr(wrapped, "start_param_sync", lambda *args, force_sync=False: gathered.append(force_sync))
    with compat.complete_parameters(wrapped):
        assert gathered == [True] and not wrapped.remove_forward_pre_hook_handles
    assert wrapped.remove_forward_pre_hook_handles
    _, plain, _ = _optimizer()
    with compat.complete_parameters(plain):
        pass


def test_logged_losses_are_not_divided_with_the_loss() -> None:
    loss, logged = _loss(torch.tensor([[1.0, 3.0]]))
    loss /= 4  # as Megatron's schedules do
    assert logged["loss"].item() == 2
