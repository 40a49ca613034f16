"""Trains recipes in the processes of a test, small ones and without the screen."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan import runner

from .jobs import Recorder, without_waiting

SMALL = ("training.steps=6", "training.seq_len=32", "training.global_batch_size=4", "model.num_hidden_layers=2")


class QuietTrainer(runner.MonitoredTrainer):
    """Without the screen."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.monitor is not None:
            self.monitor.stop()
        self.metrics_processor.logger = self.recorder = Recorder()


def train(folder: Path, *overrides: str, name: str = "deepseek_v3_debug") -> dict[int, float]:
    """The losses of a run, by step."""
    loaded = recipe.load(name, [*SMALL, f"folder={folder}", *overrides])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"heldout": None})})
    trainer = QuietTrainer(runner.prepare(loaded, dist.get_world_size(), True))
    try:
        with without_waiting():
            trainer.train()
        if loaded.checkpoint.export:
            trainer.export(loaded.model)
    finally:
        trainer.close()
    losses = trainer.recorder.losses
    return dict(zip(range(trainer.step - len(losses) + 1, trainer.step + 1), losses, strict=True))
