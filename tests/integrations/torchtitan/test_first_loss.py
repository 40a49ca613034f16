"""Both generations of TorchTitan are the same models: from the same weights, on the same tokens, the same first loss.

The weights are random numbers that follow from their names in Hugging Face's format, which both read; the batch is the
beginning of one long document, since the generations pack several in different ways. Each generation is tested in an
environment of its own, against the numbers below.
"""

import json
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan import runner

from ... import processes

FIRST_LOSSES = {"llama3_debug": 7.045706, "qwen3_moe_debug": 6.683467, "deepseek_v3_debug": 6.897887}


class Recorder(runner.BaseLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.losses.append(metrics["loss_metrics/global_avg_loss"])


def _trainer(name: str, root: Path, *overrides: str) -> Any:
    small = ("training.seq_len=64", "training.global_batch_size=1", "training.micro_batch_size=1", "training.steps=1")
    data = f"data.train={root / 'text.jsonl'}"
    loaded = recipe.load(name, [*small, data, f"folder={root / 'run'}", "model.num_hidden_layers=3", *overrides])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"heldout": None})})
    trainer = runner.MonitoredTrainer(runner.prepare(loaded, 1, True))
    trainer.metrics_processor.logger = Recorder()
    return trainer


def weight(name: str, shape: torch.Size) -> torch.Tensor:
    """Large enough that the outputs depend on every part of the model."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.1 * numbers if len(shape) == 1 else 0.06 * numbers


def _run(name: str, root: Path) -> None:
    text = "".join(chr(32 + (i * i * i + 7 * i) % 90) for i in range(400))
    (root / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    first = _trainer(name, root, "checkpoint.every=1")
    manager = first.checkpointer
    names = manager.sd_adapter.to_hf(manager.states["model"].state_dict())
    (root / "weights").mkdir()
    save_file({key: weight(key, x.shape) for key, x in names.items()}, root / "weights/model.safetensors")
    first.close()
    trainer = _trainer(name, root, f"checkpoint.start_from={root / 'weights'}", f"folder={root / 'from weights'}")
    with mock.patch("time.sleep"):
        trainer.train()
    trainer.close()
    (root / "loss.json").write_text(json.dumps(trainer.metrics_processor.logger.losses))


@pytest.mark.parametrize("name", FIRST_LOSSES)
def test_first_loss(name: str, tmp_path: Path) -> None:
    processes.run(_run, name, tmp_path, processes=1)
    found = json.loads((tmp_path / "loss.json").read_text())
    assert found == pytest.approx([FIRST_LOSSES[name]], abs=1e-5 if name == "llama3_debug" else 1e-4)
