"""Our training step: what stock's computes, without waiting for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe_train import recipe
from flashmoe_train.integrations.torchtitan import runner
from flashmoe_train.integrations.torchtitan.converters import documents
from flashmoe_train.integrations.torchtitan.converters.trainer import Stock, Trainer

from ... import processes
from .jobs import without_waiting
from .runs import SMALL, QuietTrainer


def _trainer(folder: Path, world_size: int, *overrides: str, name: str = "deepseek_v3_debug") -> QuietTrainer:
    loaded = recipe.load(name, [*SMALL, f"folder={folder}", *overrides])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"heldout": None})})
    return QuietTrainer(runner.prepare(loaded, world_size, True))


def _logged(folder: Path, step: Any) -> list[tuple]:
    """What every step of a run says: loss, largest loss of a process, norm and the extra metrics."""
    # Two microbatches a step, of which processes have different tokens.
    overrides = (
        "training.micro_batch_size=1",
        "data.document_masks=true",
        "training.steps=3",
        "torchtitan.metrics.log_freq=1",
        "training.seed=3",
    )
    trainer = _trainer(folder, 2, *overrides)
    said: list[tuple] = []
    log = trainer.metrics_processor.log

    def heard(*arguments: Any, extra_metrics: dict[str, Any]) -> None:
        said.append((*arguments, extra_metrics))
        log(*arguments, extra_metrics=extra_metrics)

    trainer.metrics_processor.log = heard
    Trainer.train_step = step  # type: ignore[method-assign]
    try:
        with without_waiting():
            trainer.train()
    finally:
        trainer.close()
    return said


def _says_what_stock_says(folder: Path) -> None:
    ours = _logged(folder / "ours", Trainer.train_step)
    stock = _logged(folder / "stock", Stock.train_step)
    assert len(ours) == len(stock) == 3
    for own, theirs in zip(ours, stock, strict=True):
        assert own[0] == theirs[0] and own[4] == theirs[4]  # step; tokens and learning rate
        torch.testing.assert_close(own[1:4], theirs[1:4], rtol=1e-6, atol=0)
    assert ours[0][2] > ours[0][1]  # the processes' losses differ


def test_says_what_stock_says(tmp_path: Path) -> None:
    processes.run(_says_what_stock_says, tmp_path)


def _asks_the_host_for_documents(folder: Path) -> None:
    trainer = _trainer(folder, 1, "data.document_masks=true")
    tokens = torch.randint(0, 200, (2, 32))
    tokens[0, 7] = trainer.tokenizer.eos_id
    sent = documents.send(tokens, trainer.model_parts[0], trainer.tokenizer, trainer.device)
    made = documents.create_varlen_metadata_for_document
    documents.create_varlen_metadata_for_document = None  # it is not asked again
    try:
        mask = trainer.model_parts[0].get_attention_masks(sent, trainer.tokenizer)
    finally:
        documents.create_varlen_metadata_for_document = made
        trainer.close()
    assert mask.documents.cu_seq_q.tolist() == [0, 8, 32, 64] and mask.documents.cu_seq_q.device == sent.device


def test_asks_the_host_for_documents(tmp_path: Path) -> None:
    processes.run(_asks_the_host_for_documents, tmp_path, processes=1)


def _waits_for_nothing(folder: Path) -> None:
    trainer = _trainer(folder, 1, "torchtitan.metrics.log_freq=100", "data.document_masks=true")
    step = trainer.train_step

    def watched(batches: Any) -> None:
        # The first step allocates and compiles nothing that the others do, but waits for what it makes once.
        torch.cuda.set_sync_debug_mode("error" if trainer.step > 2 else "default")
        try:
            step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.train_step = watched  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.close()


@pytest.mark.gpu
def test_waits_for_nothing(tmp_path: Path) -> None:
    processes.run(_waits_for_nothing, tmp_path, processes=1)
