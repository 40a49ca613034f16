"""Both generations of TorchTitan are the same models, which other frameworks are too (`first_loss`)."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan import runner

from ... import processes
from .. import first_loss
from ..first_loss import BIAS, FIRST_LOSSES, SMALL, UNBIASED


class Recorder(runner.BaseLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.losses.append(metrics["loss_metrics/global_avg_loss"])


def _trainer(name: str, root: Path, *overrides: str) -> Any:
    data = f"data.train={root / 'text.jsonl'}"
    loaded = recipe.load(name, [*SMALL, data, f"folder={root / 'run'}", "model.num_hidden_layers=3", *overrides])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"heldout": None})})
    trainer = runner.MonitoredTrainer(runner.prepare(loaded, 1, True))
    trainer.metrics_processor.logger = Recorder()
    return trainer


def _run(name: str, biased: bool, root: Path) -> None:
    first_loss.write_text(root)
    first = _trainer(name, root, "checkpoint.every=1")
    manager = first.checkpointer
    names = manager.sd_adapter.to_hf(manager.states["model"].state_dict())
    first.close()
    shapes = {key: x.shape for key, x in names.items() if biased or not key.endswith(BIAS)}
    weights = first_loss.write_weights(root, shapes)
    trainer = _trainer(name, root, f"checkpoint.start_from={weights}", f"folder={root / 'from weights'}")
    with mock.patch("time.sleep"):
        trainer.train()
    trainer.close()
    (root / "loss.json").write_text(json.dumps(trainer.metrics_processor.logger.losses))


@pytest.mark.parametrize(
    "name, biased", [*((name, True) for name in FIRST_LOSSES), *((name, False) for name in UNBIASED)]
)
def test_first_loss(name: str, biased: bool, tmp_path: Path) -> None:
    processes.run(_run, name, biased, tmp_path, processes=1)
    found = json.loads((tmp_path / "loss.json").read_text())
    first_loss.assert_first(name, found, FIRST_LOSSES if biased else UNBIASED)
