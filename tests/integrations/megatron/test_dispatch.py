"""Experts that processes share by our exchange: the results by Megatron's, and steps without room for them."""

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

import flashmoe_train
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import exchanges
from flashmoe_train.integrations.exchanges import MOST_SKIPPED
from flashmoe_train.integrations.megatron import compat, cpu, runner, swap
from flashmoe_train.integrations.megatron.layer import LocalDispatcher

from ... import processes
from . import jobs
from .test_specs import build, loss, with_experts

LAYERS: list[dict[str, Any]] = [
    {},
    {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    },
    {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "probs"},
    {"moe_shared_expert_intermediate_size": 16, "recompute_granularity": "full"}
    | {"recompute_method": "uniform", "recompute_num_layers": 1},
]


def results(model: GPTModel) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients, of tokens that differ between processes."""
    with torch.no_grad():
        model.embedding.word_embeddings.weight.add_(dist.get_rank())
    one = loss(model) * (1 + dist.get_rank())
    one.backward()
    return one.detach(), {name: p.grad for name, p in model.named_parameters()}


def _two_lines_in_a_script() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    cpu.apply()
    compat.apply()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    for options in LAYERS:
        given = with_experts(expert_model_parallel_size=2, **options)
        spec = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
        found = []
        for choice in ("stock", "flashmoe"):
            model_parallel_cuda_manual_seed(0)
            model = build(given, swap(spec, given, dispatch=choice))
            dispatcher = model.decoder.layers[0].mlp.token_dispatcher
            assert type(dispatcher) is {"stock": MoEAlltoAllTokenDispatcher, "flashmoe": LocalDispatcher}[choice]
            found.append(results(model))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
        if not options:  # a model that is built already keeps Megatron's dispatcher
            model_parallel_cuda_manual_seed(0)
            model = build(given, spec)
            flashmoe_train.swap(model)
            assert type(model.decoder.layers[0].mlp.token_dispatcher) is MoEAlltoAllTokenDispatcher
            found.append(results(model))
            torch.testing.assert_close(found[2], found[0])
        (exchange,) = exchanges._exchanges.values()
        assert exchange.tokens == 32 and not exchange.lost.any() and exchange.layers == ["1", "2"]
        exchanges.forget()
    model_parallel_cuda_manual_seed(0)
    model = build(given, swap(spec, given, dispatch="flashmoe", dispatch_tokens=31))
    with pytest.raises(UsageError, match="layer 1 has 32 tokens at once, and our exchange was made for 31: set swap's"):
        loss(model)


def test_two_lines_in_a_script() -> None:
    processes.run(_two_lines_in_a_script)


def _skips_steps(root: Path) -> None:
    said: list[str] = []
    logging.root.handlers[:] = [handler := logging.Handler()]
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    weights: list[torch.Tensor] = []  # after every step
    rates: list[float] = []
    full: set[int | None] = {2}  # steps for which there is no room; None: validation
    stock = {name: getattr(runner.Trainer, name) for name in ("_forward_backward", "_train_step")}

    def forward_backward(self: runner.Trainer, *args: Any, forward_only: bool = False, **options: Any) -> Any:
        step = None if forward_only else self.step + 1
        for exchange in exchanges._exchanges.values():
            exchange.rows = 4 if step in full else 128
        return stock["_forward_backward"](self, *args, forward_only=forward_only, **options)

    def train_step(self: runner.Trainer) -> None:
        stock["_train_step"](self)
        weights.append(self.model.decoder.layers[0].self_attention.linear_qkv.weight.detach().clone())
        rates.append(self.optimizer.param_groups[0]["lr"])

    runner.Trainer._forward_backward = forward_backward  # type: ignore[method-assign]
    runner.Trainer._train_step = train_step  # type: ignore[method-assign]
    overrides = ["parallel.expert=2", "swap.dispatch=flashmoe", "megatron.ddp.overlap_param_gather=false"]
    given = jobs.recipe_of("moe", root / "run", root / "tokens.bin", "training.steps=4", *overrides)
    found = jobs.train(given)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [False, True, True] and rates[0] == rates[1] < rates[2]
    assert found is None or all(map(math.isfinite, found.grad_norms))
    lines = [line for line in said if "was skipped" in line]
    assert {line.partition(" had no room for ")[0] for line in lines} == {
        f"flashmoe: the last step was skipped: the experts of layer {layer} on rank {dist.get_rank()} of their group"
        for layer in (1, 2)
    }
    assert all(line.endswith(" rows beyond 4; set [swap] dispatch_capacity above 2") for line in lines)
    said.clear(), weights.clear()
    full = {None}
    checks = [f"data.heldout={root / 'tokens.bin'}", "training.validate_every=1", "training.validate_steps=1"]
    checks.append("training.steps=3")
    jobs.train(jobs.recipe_of("moe", root / "checked", root / "tokens.bin", *overrides, *checks))
    assert not torch.equal(*weights[1:]) and any("the held-out loss leaves rows out" in line for line in said)
    full = set(range(10))
    with pytest.raises(UsageError, match=rf"^{MOST_SKIPPED} steps in a row .* set \[swap\] dispatch_capacity above 2"):
        jobs.train(jobs.recipe_of("moe", root / "full", root / "tokens.bin", *overrides))


def test_steps_without_room_are_skipped(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_skips_steps, tmp_path)


def _stages(root: Path) -> None:
    """The first pipeline stage has a dense layer alone: nothing is exchanged there, and steps are skipped all the
    same."""
    layout = ["parallel.pipeline=2", "parallel.expert=2", "training.steps=6"]
    found = []
    for number, dispatch in enumerate(([], ["swap.dispatch=flashmoe"])):
        given = jobs.recipe_of("mla", root / str(number), root / "tokens.bin", *layout, *dispatch)
        found.append(jobs.train(given))
    assert (found[0] is None) == (found[1] is None)
    if found[0] is not None and found[1] is not None:
        torch.testing.assert_close(found[1].losses, found[0].losses, rtol=0, atol=1e-5)
    small = [*layout, "swap.dispatch=flashmoe", "swap.dispatch_capacity=0.1"]
    with pytest.raises(UsageError, match=rf"^{MOST_SKIPPED} steps in a row"):
        jobs.train(jobs.recipe_of("mla", root / "full", root / "tokens.bin", *small))


@pytest.mark.slow
def test_pipeline_stages(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_stages, tmp_path, processes=4)
