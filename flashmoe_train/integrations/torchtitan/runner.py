"""Runs a recipe under TorchTitan: its own trainer, with our progress bar and summary, and the experts' load."""

import logging
import os
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import BaseLogger

from flashmoe_train import data, huggingface
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import sizes
from flashmoe_train.integrations.torchtitan import generation, recipes
from flashmoe_train.integrations.torchtitan.checkpoints import Checkpoints
from flashmoe_train.integrations.torchtitan.expert_load import ExpertLoad
from flashmoe_train.monitor import Monitor, Step
from flashmoe_train.recipe import write
from flashmoe_train.schema import Model, Recipe

job, plan = generation.part("job"), generation.part("plan")
Trainer: Any = generation.part("trainer").Trainer


def run(recipe: Recipe, command: str, allow_fallback: bool) -> None:
    """Trains the recipe in this process, one of those torchrun started. Console output comes from one process only.
    `command` is what the user typed, to suggest another."""
    early = _keep_log_lines()
    config = prepare(recipe, int(os.environ["WORLD_SIZE"]), allow_fallback)
    folder = job.facts(config).folder
    _log_to(folder / f"log_rank{os.environ['RANK']}.txt", early)
    if os.environ["RANK"] == "0":
        write(recipe, folder / "recipe.toml")
    trainer = MonitoredTrainer(config)
    try:
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
            if recipe.checkpoint.export == "huggingface":
                trainer.export(recipe.model)
            trainer.summarise(command)
    finally:
        trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(recipe: Recipe, world_size: int, allow_fallback: bool) -> Any:
    """TorchTitan's configuration of the recipe, checked, and the folder of the run with what it needs in it."""
    resolved, config = recipes.resolve(recipe, world_size)
    facts = job.facts(config)
    if not allow_fallback:
        of_model = job.sizes(resolved.tables)
        dtype, wanted = plan.precision(config, world_size), config.training.mixed_precision_param
        hint = f" ([training] dtype, which TorchTitan takes without FSDP, where precision is {wanted})"
        sizes.check_kernels(facts.choices, dtype, of_model, hint if dtype != wanted else "")
    try:
        facts.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder of the run, {facts.folder}, cannot be made: {error}") from None
    if facts.tokenizer == data.BYTE_TOKENIZER:
        job.use_tokenizer(config, data.write_byte_tokenizer(facts.folder / "byte_tokenizer"))
    return config


def _keep_log_lines() -> MemoryHandler:
    """TorchTitan logs every setting and step through the root logger: that goes to a file, the screen stays ours. Until
    the run's folder is known the lines are kept."""
    logging.captureWarnings(True)
    logging.root.setLevel(logging.INFO)
    early = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    logging.root.handlers[:] = [early]
    return early


def _log_to(path: Path, early: MemoryHandler) -> None:
    handler = logging.FileHandler(path)  # after what earlier runs in this folder said
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    early.setTarget(handler)
    early.close()
    logging.root.handlers[:] = [handler]


class MonitoredTrainer(Trainer):
    """TorchTitan's trainer; the process that TorchTitan lets write metrics also shows them."""

    monitor: Monitor | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.facts: generation.Facts = job.facts(config)
        self.checkpointer.__class__ = Checkpoints
        _check_vocabulary(self.tokenizer.get_vocab_size(), self.vocabulary())
        dims = self.parallel_dims
        other_layers = dims.get_mesh("pp").get_group() if dims.pp_enabled else None
        self.expert_load = ExpertLoad(self.model_parts, self.processes_with_other_tokens(), other_layers)
        metrics = self.metrics_processor
        if dist.get_rank() == self.metrics_rank():
            title = f"{self.facts.model} on {dist.get_world_size()} × {self.device.type}"
            self.monitor = Monitor(title, self.facts.folder, config.training.steps)
        metrics.logger = _Metrics(metrics.logger, self.expert_load, self.monitor)
        if self.facts.validates and (overflows := self.overflows()) is not None:
            validate = self.validator.validate

            def reported(*arguments: Any, **options: Any) -> None:
                validate(*arguments, **options)
                overflows.report_validation()

            self.validator.validate = reported

    def forward_backward_step(self, **batch: Any) -> Any:
        watched = bool(self.expert_load.blocks) and self.metrics_processor.should_log(self.step)
        before = self.expert_load.counts() if watched else None
        loss = super().forward_backward_step(**batch)
        if before is not None:
            self.expert_load.add(before, self.counted_tokens(batch["labels"]))
        return loss

    def train(self) -> None:
        super().train()
        # The loss on held-out data belongs into the summary, whatever the frequency of validation is.
        if self.facts.validates and not self.validator.should_validate(self.step):
            self.validator.validate(self.model_parts, self.step)
        if (overflows := self.overflows()) is not None:
            overflows.report()  # of the last step, which no other one follows

    def export(self, model: Model | None) -> None:
        """Writes the weights in Hugging Face's format, with a config.json if the recipe has the model's sizes."""
        files = {}
        if model is not None:
            tokens = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": self.tokenizer.eos_id}
            dtype, seq_len = self.config.checkpoint.export_dtype, self.config.training.seq_len
            files["config.json"] = huggingface.config(model, seq_len, dtype, tokens)
        self.checkpointer.export(self.facts.folder / "huggingface", files, Path(self.facts.tokenizer))

    def summarise(self, command: str) -> None:
        if self.monitor is None:
            return
        self.monitor.finish(
            swaps=self.swapped(),
            tensorboard=self.facts.folder / self.config.metrics.save_tb_folder,
            unigram_entropy=data.entropy_for_scale(self.facts.dataset, Path(self.facts.tokenizer)),
            next_command=f"{command} training.steps={2 * self.config.training.steps}",
            overflows=self.overflows(),
        )

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.stop()
        super().close()


class _Metrics(BaseLogger):
    """Adds the experts' load to TorchTitan's metrics; its own loggers get them and, in one process, the monitor."""

    def __init__(self, loggers: BaseLogger, expert_load: ExpertLoad, monitor: Monitor | None) -> None:
        self.loggers = loggers
        self.expert_load = expert_load
        self.monitor = monitor

    def log(self, metrics: dict[str, Any], step: int) -> None:
        heldout = metrics.get("validation_metrics/loss")
        if heldout is None:
            metrics = metrics | self.expert_load.take()
        self.loggers.log(metrics, step)
        if self.monitor is None:
            return
        if heldout is not None:
            self.monitor.log_heldout(step, heldout)
        else:
            self.monitor.log_step(
                Step(
                    step,
                    loss=metrics["loss_metrics/global_avg_loss"],
                    grad_norm=metrics["grad_norm"],
                    tokens_per_s=metrics["throughput(tps)"],
                    seconds=metrics["time_metrics/end_to_end(s)"],
                    peak_gib=max(0.0, metrics["memory/max_active(GiB)"]),
                    expert_load=metrics.get("expert_load/max_over_mean"),
                    dropped_rows=metrics.get("expert_load/dropped_rows"),
                )
            )

    def close(self) -> None:
        self.loggers.close()


def _check_vocabulary(tokens: int, rows: int) -> None:
    """A token that the embedding does not have would end in an index error, or on a GPU in an assertion."""
    if tokens > rows:
        raise UsageError(f"the tokenizer has {tokens} tokens, the model's vocab_size is {rows}: it must not be less")
