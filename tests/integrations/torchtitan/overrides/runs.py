"""Trains recipes under TorchTitan 0.3.x in the processes of a test, small ones and without the screen."""

import contextlib
import json
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan import recipes, runner
from flashmoe_train.schema import Recipe

MODELS = ("llama3_debug", "qwen3_moe_debug", "deepseek_v3_debug")
STEPS = 4
SMALL = (
    "training.seq_len=48",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    f"training.steps={STEPS}",
)
SMALL += ("model.num_hidden_layers=2", "training.warmup_steps=1", "data.document_masks=true")


class Recorder(runner.BaseLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.losses.append(metrics["loss_metrics/global_avg_loss"])


class QuietTrainer(runner.MonitoredTrainer):
    """Without the screen."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.monitor is not None:
            self.monitor.stop()
        self.metrics_processor.logger = self.recorder = Recorder()


def texts(path: Path) -> Path:
    """A file of texts that are all the same, so that every process of every layout reads the same batches. A row of a
    batch holds several, and the last one is cut."""
    text = "".join(chr(97 + (i * i + 3 * i) % 23) for i in range(20))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(400)))
    return path


def load(name: str, root: Path, *overrides: str) -> Recipe:
    loaded = recipe.load(name, [*SMALL, f"data.train={root / 'texts.jsonl'}", f"folder={root / 'run'}", *overrides])
    return loaded.model_copy(update={"data": loaded.data.model_copy(update={"heldout": None})})


def write_seed(name: str, root: Path) -> None:
    """Weights of the stock model, which every layout starts from."""
    seed, _ = recipes.seed(load(name, root), str(root / "seed"))
    trainer = QuietTrainer(runner.prepare(seed, 1, True))
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()


def train(name: str, root: Path, *overrides: str, from_seed: bool = True) -> tuple[list[float], QuietTrainer]:
    """The losses of a run, on the process that knows them, and its trainer."""
    torch._dynamo.reset()
    loaded = load(name, root, *overrides)
    if from_seed:
        loaded = recipes.starting_from(loaded, str(root / "seed/checkpoint/step-0"))
    trainer = QuietTrainer(runner.prepare(loaded, dist.get_world_size(), True))
    clock = types.SimpleNamespace(
        perf_counter=time.perf_counter, sleep=lambda s: None
    )  # it ends with two seconds of it
    with contextlib.closing(trainer), mock.patch("torchtitan.trainer.time", clock):
        trainer.train()
    return trainer.recorder.losses, trainer
