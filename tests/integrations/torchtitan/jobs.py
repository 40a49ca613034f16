"""Runs TorchTitan jobs in the processes of a test: a model from a seed checkpoint, a few steps, its losses."""

import contextlib
import copy
import json
import logging
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from flashmoe_train import data, recipe
from flashmoe_train.integrations.torchtitan.converters import job
from flashmoe_train.integrations.torchtitan.converters.trainer import Stock
from flashmoe_train.integrations.torchtitan.runner import BaseLogger  # TorchTitan's, imported after our adjustments

SEED_CHECKPOINT = "seed/checkpoint/step-0"

Sizes = dict[str, int]

# TorchTitan's debug models with as many layers, but narrow: they were cut for a GPU, and every layout trains twice.
NARROW: dict[str, Sizes] = {
    "llama3": {},
    "deepseek_v3": {"n_heads": 4, "inter_dim": 256, "moe_inter_dim": 64, "kv_lora_rank": 64},
    "qwen3": {"n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256, "moe_inter_dim": 64},
}


def tables_of(model: str, flavor: str, folder: Path) -> dict[str, Any]:
    """An unmodified TorchTitan job file's tables, plus our three lines."""
    return {
        "job": {
            "dump_folder": str(folder),
            "custom_config_module": "flashmoe_train.integrations.torchtitan",
        },
        "model": {
            "name": model,
            "flavor": flavor,
            "hf_assets_path": str(folder.parent / "byte_tokenizer"),
            "converters": ["flashmoe"],
        },
        "flashmoe": {"attention": "flashmoe", "moe": "flashmoe"},
        "training": {
            "dataset": "torch_sources",
            "seq_len": 64,
            "local_batch_size": 4,
            "steps": 8,
            "mixed_precision_param": "float32",
        },
        "lr_scheduler": {"warmup_steps": 2},
        "activation_checkpoint": {"mode": "none"},
        "metrics": {"log_freq": 1, "enable_tensorboard": True},
        "debug": {"seed": 0},
    }


class Recorder(BaseLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.losses.append(metrics["loss_metrics/global_avg_loss"])


def train(tables: dict[str, Any], overrides: list[str], root: Path) -> list[float] | None:
    """The losses of a job started from the seed checkpoint in `root`; None on processes that do not log."""
    logging.root.setLevel(logging.WARNING)
    torch._dynamo.reset()
    tables = copy.deepcopy(tables)
    tables["checkpoint"] = {"enable": True, "load_only": True, "initial_load_path": str(root / SEED_CHECKPOINT)}
    for override in overrides:
        recipe.apply(tables, override)
    trainer = Stock(job.parse(tables))
    logs = type(trainer.metrics_processor.logger) is not BaseLogger
    trainer.metrics_processor.logger = recorder = Recorder()
    try:
        with without_waiting():
            trainer.train()
    finally:
        trainer.close()
    return recorder.losses if logs else None


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """TorchTitan's training ends with two seconds of sleep."""
    with mock.patch(
        "torchtitan.train.time", types.SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda s: None)
    ):
        yield


def write_seed_checkpoint(tables: dict[str, Any], sizes: Sizes, root: Path) -> None:
    """Written by stock TorchTitan, so that loading it under a swap shows that the state dict is unchanged."""
    _prepare_flavor(tables, sizes)
    tables = copy.deepcopy(tables)
    tables["flashmoe"] = {"attention": "stock", "moe": "stock"}
    tables["job"]["dump_folder"] = str(root / "seed")
    tables["checkpoint"] = {"enable": True, "create_seed_checkpoint": True}
    data.write_byte_tokenizer(root / "byte_tokenizer")
    trainer = Stock(job.parse(tables))
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()


def stock_and_swapped(tables: dict[str, Any], sizes: Sizes, layouts: dict[str, list[str]], root: Path) -> None:
    """Trains every layout with stock and with swapped modules; where experts are shared, with our exchange too."""
    runs = [(layout, choice, overrides) for layout, overrides in layouts.items() for choice in choices(overrides)]
    _train_all(tables, sizes, runs, root)


def choices(overrides: list[str]) -> tuple[str, ...]:
    """How a layout is trained."""
    keys = {override.partition("=")[0].rpartition(".")[2] for override in overrides}
    shared = "expert_parallel_degree" in keys and "expert_tensor_parallel_degree" not in keys
    return ("stock", "flashmoe", "dispatch") if shared else ("stock", "flashmoe")


def one_choice(
    tables: dict[str, Any], sizes: Sizes, choice: str, overrides: list[str], layout: str, root: Path
) -> None:
    """Trains one layout with one of them."""
    _train_all(tables, sizes, [(layout, choice, overrides)], root)


def _train_all(tables: dict[str, Any], sizes: Sizes, runs: list[tuple[str, str, list[str]]], root: Path) -> None:
    """The process that logs writes the losses for `read_losses`."""
    losses: dict[str, dict[str, list[float]]] = {}
    _prepare_flavor(tables, sizes)
    for layout, choice, overrides in runs:
        parts = {"attention": "flashmoe", "moe": "flashmoe", "dispatch": "flashmoe"}
        if choice != "dispatch":
            parts = {"attention": choice, "moe": choice, "dispatch": "stock"}
        result = train(tables, [*overrides, *(f"flashmoe.{part}={value}" for part, value in parts.items())], root)
        if result is not None:
            losses.setdefault(layout, {})[choice] = result
    if losses:
        name = "_".join([*losses, str(dist.get_rank())]).replace(" ", "")
        (root / f"losses_{name}.json").write_text(json.dumps(losses))


def _prepare_flavor(tables: dict[str, Any], sizes: Sizes) -> None:
    """Of these sizes. Stock's grouped_mm experts compute in bfloat16 whatever the tokens' dtype; its for-loop experts
    do not round."""
    flavor = job.get_train_spec(tables["model"]["name"]).model_args[tables["model"]["flavor"]]
    if hasattr(flavor, "moe_args"):
        flavor.moe_args.use_grouped_mm = tables["training"]["mixed_precision_param"] == "bfloat16"
    resize(flavor, sizes)


def resize(flavor: Any, sizes: Sizes) -> None:
    for name, size in sizes.items():
        assert hasattr(flavor, name)
        setattr(flavor, name, size)


def read_losses(root: Path) -> dict[str, dict[str, list[float]]]:
    """By layout, then by "stock", "flashmoe" or "dispatch" (which has our exchange too). Under pipeline parallelism
    another process logs than otherwise."""
    losses: dict[str, dict[str, list[float]]] = {}
    for path in sorted(root.glob("losses_*.json")):
        losses |= json.loads(path.read_text())
    return losses
