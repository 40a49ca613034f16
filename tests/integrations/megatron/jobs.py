"""Trains small Megatron models in the processes of a test, as recipes do, and keeps losses and gradient norms."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from flashmoe_train import recipe
from flashmoe_train.integrations import exchanges
from flashmoe_train.integrations.megatron import attention, cpu, recipes, runner
from flashmoe_train.integrations.megatron.checkpoints import Checkpoints
from flashmoe_train.integrations.megatron.experts import FlashMoEExperts
from flashmoe_train.schema import Recipe, parse

STEPS = 8

_SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architecture": "llama3", "num_key_value_heads": 2, **_SIZES},
    "moe": {"architecture": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 16, "moe": _EXPERTS, **_SIZES},
    "mla": {
        "architecture": "deepseek_v3",
        "moe": _EXPERTS | {"n_shared_experts": 1, "first_k_dense_replace": 1, "scoring_func": "sigmoid"},
        "mla": {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        **_SIZES,
    },
}


class Run(NamedTuple):
    losses: list[float]
    grad_norms: list[float]


def write_tokens(folder: Path, seed: int = 0) -> Path:
    """A file as Megatron's preprocessing writes them, of tokens that can be learnt: a noisy count."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    steps = np.random.default_rng(seed).integers(1, 3, 20_000)
    tokens = torch.from_numpy(np.cumsum(steps) % _SIZES["vocab_size"])
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.uint16)
    for document in tokens.split(1000):
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "tokens.idx"))
    return folder / "tokens.bin"


def recipe_of(model: str, folder: Path, tokens: Path, *overrides: str) -> Recipe:
    tables: dict[str, Any] = {
        "framework": "megatron",
        "folder": str(folder),
        "model": MODELS[model],
        "data": {"train": str(tokens)},
        "training": {
            "steps": STEPS,
            "seq_len": 32,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "precision": "float32",
            "seed": 0,
        },
        "megatron": {"moe_aux_loss_coeff": 1e-2} if model != "dense" else {},
    }
    tables = json.loads(json.dumps(tables))
    for override in overrides:
        recipe.apply(tables, override)
    return parse(Recipe, tables)


def train(given: Recipe, check: Any = None) -> Run | None:
    """Trains in this process, which is one of several; what came out, on the process that knows it."""
    from megatron.core import parallel_state

    plan = recipes.resolve(given, dist.get_world_size())
    runner.start_processes(plan)
    try:
        with contextlib.closing(runner.Trainer(plan)) as trainer:
            trainer.train()
            if check is not None:
                check(trainer)
            if trainer.monitor is None:
                return None
            steps = trainer.monitor.history.steps
            return Run([step.loss for step in steps], [step.grad_norm for step in steps])
    finally:
        parallel_state.destroy_model_parallel()


def matrix(model: str, layouts: dict[str, list[str]], root: Path) -> None:
    """In every layout: stock and swapped from the start, and each of them from the checkpoints of both; under expert
    parallelism with our exchange too ("dispatch"). The process that knows writes what came out for `read`."""
    cpu.apply()
    tokens = root / "tokens.bin"
    stock_save = Checkpoints.save

    def save(self: Checkpoints, step: int, position: dict[str, int]) -> None:
        if step == STEPS // 2:  # each starts processes, which take a second
            stock_save(self, step, position)

    Checkpoints.save = save  # type: ignore[method-assign,assignment]
    for layout, overrides in layouts.items():
        found: dict[str, Run | None] = {}
        choices = [("flashmoe", "flashmoe"), ("flashmoe", "stock"), ("stock", "flashmoe")]
        if "parallel.expert=2" in overrides:
            choices.append(("dispatch", "dispatch"))
        for choice in {name: None for name, _ in [("stock", ""), *choices]}:
            folder = root / layout / choice
            found[choice] = _one(model, choice, folder, tokens, [*overrides, "checkpoint.every=4"])
        for choice, saved in choices:
            folder = root / layout / f"{choice} from {saved}"
            if dist.get_rank() == 0:
                shutil.copytree(root / layout / saved / "checkpoint/step-4", folder / "checkpoint/step-4")
            dist.barrier()
            found[folder.name] = _one(model, choice, folder, tokens, [*overrides, "checkpoint.keep=2"])
        if found["stock"] is not None:
            known = {name: run._asdict() for name, run in found.items() if run}
            (root / f"{layout}.json").write_text(json.dumps(known))


def _one(model: str, choice: str, folder: Path, tokens: Path, overrides: list[str]) -> Run | None:
    if choice == "dispatch":
        return train(recipe_of(model, folder, tokens, *overrides, "swap.dispatch=flashmoe"), _check_exchange)
    if model != "mla" or choice == "flashmoe":
        swap = [f"swap.attention={choice}", f"swap.moe={choice}"]
        return train(recipe_of(model, folder, tokens, *overrides, *swap))
    with mock.patch.object(attention, "FlashMoEAttention", stock_latent()):
        return train(recipe_of(model, folder, tokens, *overrides, "swap.moe=stock"))


def _check_exchange(trainer: runner.Trainer) -> None:
    """Tokens took the way that the recipe says."""
    experts = [module for module in trainer.model.modules() if isinstance(module, FlashMoEExperts)]
    (exchange,) = exchanges._exchanges.values()
    assert exchange.layers == [module.layer for module in experts] and not exchange.lost.any()


def stock_latent() -> type:
    """Megatron's own attention for latent attention, whose head dims it does not take: given the softmax scale, it does
    without that of the keys, and the values' is what the configuration says."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class StockLatentAttention(DotProductAttention):
        def __init__(self, *args: Any, k_channels: Any = None, v_channels: Any = None, **options: Any) -> None:
            super().__init__(*args, **options)

    return StockLatentAttention


def read(root: Path, layout: str) -> dict[str, Run]:
    return {name: Run(**run) for name, run in json.loads((root / f"{layout}.json").read_text()).items()}
