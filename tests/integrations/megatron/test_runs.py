"""Recipes of Megatron from end to end: the shipped one as a user starts it, work that is kept, validation."""

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashmoe_train import recipe
from flashmoe_train.compare import compare
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import checkpoints, compat, recipes, runner, token_files
from flashmoe_train.integrations.megatron.checkpoints import Checkpoints
from flashmoe_train.integrations.megatron.token_files import TokenFile
from flashmoe_train.monitor import new_console
from flashmoe_train.schema import Swap

from ... import processes
from ...test_train import flashmoe
from ..damaged import changed, flipped
from . import jobs

SMALL = ("training.steps=6", "training.seq_len=32", "training.validate_steps=2", "model.num_hidden_layers=2")


def test_trains_and_reports(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = (*SMALL, "training.validate_every=4", "checkpoint.every=6", "checkpoint.export=huggingface")
    command = ("train", "megatron_moe_debug", *overrides, "parallel.expert=1", "--processes=1", "--allow-fallback")
    result = flashmoe(*command, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "outputs/megatron_moe_debug"
    summary = json.loads((run / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [check["step"] for check in summary["heldout"]] == [4, 6]
    assert summary["steps"][-1]["loss"] < summary["steps"][0]["loss"] - 0.5
    assert all(step["dropped_rows"] == 0 and 1 <= step["expert_load"] <= 4 for step in summary["steps"])
    assert {row["to"] for row in summary["swapped"]} == {"FlashMoEAttention", "FlashMoELayer", "FlashMoEExperts"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG") and (run / "log_rank0.txt").exists()
    assert (run / "huggingface/model.safetensors").exists() and checkpoints.is_complete(run / "checkpoint/step-6")
    (events,) = run.glob("tb/*")
    logged = EventAccumulator(str(events)).Reload()
    for tag in ("loss_metrics/global_avg_loss", "expert_load/max_over_mean", "lr", "grad_norm"):
        assert [event.step for event in logged.Scalars(tag)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in logged.Scalars("validation_metrics/loss")] == [4, 6]
    for text in ("What was swapped", "held-out loss", "expert load", "tensorboard --logdir"):
        assert text in result.stdout
    assert "UserWarning" not in result.stdout + result.stderr
    longer = flashmoe(*command[:2], *overrides, "training.steps=7", *command[-3:], folder=tmp_path)
    assert longer.returncode == 0, longer.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3, 4, 5, 6, 7]


def test_mistakes_end_without_a_traceback(tmp_path: Path) -> None:
    result = flashmoe("train", "megatron_moe_debug", "megatron.num_layer=2", folder=tmp_path)
    assert result.returncode == 2 and result.stderr == (
        "error: unknown key [megatron] num_layer; did you mean 'num_layers'?\n"
    )


@pytest.mark.slow
def test_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    loaded = recipe.load("megatron_moe_debug", [f"folder={tmp_path}/run", *SMALL])
    assert compare(loaded, 2, True, new_console()) <= 1e-5
    written = json.loads((tmp_path / "run/compare/compare.json").read_text())
    assert written["stock"]["losses"][-1] < written["stock"]["losses"][0] - 0.5


def _keeps(root: Path) -> None:
    tokens = root / "tokens.bin"
    given = jobs.recipe_of("dense", root / "run", tokens, "checkpoint.every=1", "checkpoint.keep=2", "training.steps=4")
    whole = jobs.train(given)
    (root / "run/checkpoint/unfinished").mkdir()  # as a run leaves it that is killed in a save
    start = f"checkpoint.start_from={root / 'run/checkpoint/step-4'}"
    stock = {"swap": Swap(attention="stock", moe="stock")}
    first = jobs.train(jobs.recipe_of("dense", root / "again", tokens, start).model_copy(update=stock))
    assert whole is not None and first is not None and first.losses[0] < whole.losses[0] - 0.05
    with pytest.raises(UsageError, match="does not fit the model"):
        jobs.train(jobs.recipe_of("moe", root / "other", tokens, start))


def _goes_on_with_its_own_schedule(root: Path) -> None:
    """Of the run that it resumes it has the number of steps alone."""
    given = [root / "run", root / "tokens.bin", "checkpoint.every=2", "training.warmup_steps=0"]
    jobs.train(jobs.recipe_of("dense", *given, "training.steps=2"))

    def check(trainer: runner.Trainer) -> None:
        scheduler = trainer.scheduler
        assert (scheduler.num_steps, scheduler.lr_decay_steps, scheduler.max_lr) == (3, 6, 0.02)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([0.02 * 3 / 6] * len(rates))

    train_step = runner.Trainer._train_step

    def one_step(self: runner.Trainer) -> None:
        train_step(self)
        self.step = self.plan.steps

    runner.Trainer._train_step = one_step  # type: ignore[method-assign]
    jobs.train(jobs.recipe_of("dense", *given, "training.steps=6", "training.learning_rate=0.02"), check)


def test_a_resumed_run_has_its_own_schedule(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_goes_on_with_its_own_schedule, tmp_path, processes=1)


def _goes_on_with_other_steps(root: Path) -> None:
    """After three steps of four sequences, steps of two; after one of those, steps of four again."""
    tokens, read = root / "tokens.bin", list[int]()
    sequences = TokenFile.sequences

    def noted(self: TokenFile, numbers: torch.Tensor) -> torch.Tensor:
        read.extend(numbers.tolist())
        return sequences(self, numbers)

    TokenFile.sequences = noted  # type: ignore[method-assign]
    for steps, batch in ((3, 4), (4, 2), (5, 4)):
        read.clear()
        given = [f"training.steps={steps}", f"training.global_batch_size={batch}", "checkpoint.every=1"]
        jobs.train(jobs.recipe_of("dense", root / "run", tokens, *given))
        assert read == {3: list(range(12)), 4: [12, 13], 5: [14, 15, 16, 17]}[steps]
    longer = jobs.recipe_of("dense", root / "run", tokens, "training.seq_len=64", "checkpoint.every=1")
    with pytest.raises(UsageError, match=r"\[training\] seq_len = 64: .*run/checkpoint is of a run with 32"):
        jobs.train(longer)


def test_data_goes_on_whatever_a_step_takes(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_goes_on_with_other_steps, tmp_path, processes=1)


def _tokenises_what_is_left(root: Path) -> None:
    """Of steps that took more before, more is needed than the steps of now would take in all."""
    (root / "text.txt").write_text("some words of a text\n" * 2000)
    needed = list[int]()
    prepare = token_files.prepare

    def noted(*arguments: Any) -> None:
        needed.append(arguments[-1] // 33)
        prepare(*arguments)

    token_files.prepare = noted
    for steps, batch in ((2, 8), (4, 2)):
        given = [f"training.steps={steps}", f"training.global_batch_size={batch}", "training.warmup_steps=0"]
        jobs.train(jobs.recipe_of("dense", root / "run", root / "text.txt", *given, "checkpoint.every=1"))
    assert needed == [16, 8, 20]


def test_tokens_suffice_whatever_a_step_took(tmp_path: Path) -> None:
    processes.run(_tokenises_what_is_left, tmp_path, processes=1)


def _tokenises_for_long(root: Path) -> None:
    """Longer than the processes' collectives may take."""
    (root / "text.txt").write_text("some words of a text\n" * 2000)
    plan = recipes.resolve(jobs.recipe_of("dense", root / "run", root / "text.txt"), 2)
    prepare = token_files.prepare

    def slow(*arguments: Any) -> None:
        time.sleep(25)
        prepare(*arguments)

    token_files.prepare = slow
    from megatron.core import parallel_state

    runner.start_processes(plan)
    try:
        runner.Trainer(plan).close()
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.slow
def test_waits_for_the_process_that_tokenises(tmp_path: Path) -> None:
    processes.run(_tokenises_for_long, tmp_path, timeout=timedelta(seconds=20))


def _refuses_damaged(root: Path) -> None:
    given = [root / "run", root / "tokens.bin", "checkpoint.every=2", "training.warmup_steps=0"]
    jobs.train(jobs.recipe_of("dense", *given, "training.steps=4"))
    newest, older = (root / f"run/checkpoint/step-{step}" for step in (4, 2))
    longer = jobs.recipe_of("dense", *given, "training.steps=5")
    go_on = rf"\. A run cannot go on with this checkpoint; {older} is whole: remove {newest} and .* from step 2$"
    for change, text in (
        (lambda content: content[:-1000], "is cut off: .* bytes of "),
        (flipped, "is damaged: what lies at byte .* is not what was written"),
        (lambda content: None, "is missing"),
    ):
        with changed(newest / "__0_0.distcp", change), pytest.raises(UsageError, match=f"{newest}/.* {text}.*{go_on}"):
            jobs.train(longer)
    with changed(newest / "__0_0.distcp", flipped), pytest.raises(UsageError, match=r"step-4/__0_0\.distcp is damaged"):
        jobs.train(jobs.recipe_of("dense", root / "new", root / "tokens.bin", f"checkpoint.start_from={newest}"))
    run = jobs.train(longer)
    assert run is not None and len(run.losses) == 1


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_refuses_damaged, tmp_path, processes=1)


def test_keeps_the_newest_and_starts_from_weights(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_keeps, tmp_path, processes=1)
    folder = tmp_path / "run/checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-4", "unfinished"]
    assert checkpoints.complete(folder) == [folder / "step-4", folder / "step-3"]


def _saves_the_last_step(root: Path) -> None:
    """Every process has updated its part of the weights, and gathers the others' in its next forward."""
    tokens, last = root / "tokens.bin", dict[str, torch.Tensor]()
    given = ["training.steps=3", "checkpoint.every=3"]

    def keep(trainer: runner.Trainer) -> None:
        trainer.export()
        with compat.complete_parameters(trainer.wrapped):
            last.update({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})

    def same(trainer: runner.Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, last[name]), name

    jobs.train(jobs.recipe_of("moe", root / "run", tokens, *given), keep)
    runner.Trainer.train = lambda self: None  # type: ignore[method-assign]
    for number, saved in enumerate(("checkpoint/step-3", "huggingface")):
        start = f"checkpoint.start_from={root / 'run' / saved}"
        jobs.train(jobs.recipe_of("moe", root / str(number), tokens, "training.steps=3", start), same)


def test_weights_are_saved_as_the_last_step_left_them(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_saves_the_last_step, tmp_path)


def _resumes_from_what_was_written_meanwhile(root: Path) -> None:
    """While a checkpoint is written the next steps change the weights that it is of."""
    tokens, found = root / "tokens.bin", list[jobs.Run | None]()
    given = ["training.micro_batch_size=2", "checkpoint.asynchronous=true"]
    started: list[int] = []
    save = Checkpoints.save

    def started_only(self: Checkpoints, step: int, position: dict[str, int]) -> None:
        save(self, step, position)
        started.append(step)
        assert self.writing is not None and self.writing.get_num_unfinalized_calls() == 1
        assert not (self.folder / f"step-{step}").exists()

    Checkpoints.save = started_only  # type: ignore[method-assign]
    found.append(jobs.train(jobs.recipe_of("moe", root / "whole", tokens, *given, "checkpoint.every=4")))
    assert started == [4, 8]
    if dist.get_rank() == 0:
        shutil.copytree(root / "whole/checkpoint/step-4", root / "again/checkpoint/step-4")
    dist.barrier()
    found.append(jobs.train(jobs.recipe_of("moe", root / "again", tokens, *given, "checkpoint.keep=2")))
    if found[0] is not None and found[1] is not None:
        assert found[1] == jobs.Run(found[0].losses[4:], found[0].grad_norms[4:])


def test_asynchronous_checkpoints(tmp_path: Path) -> None:
    jobs.write_tokens(tmp_path)
    processes.run(_resumes_from_what_was_written_meanwhile, tmp_path)
    assert sorted(path.name for path in (tmp_path / "whole/checkpoint").iterdir()) == ["step-4", "step-8"]
