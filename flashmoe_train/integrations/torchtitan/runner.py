"""Runs a recipe under TorchTitan: its own trainer, with our progress bar and summary, and the experts' load."""

import logging
import os
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import BaseLogger, _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.train import Trainer

from flashmoe_train import data, huggingface
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import compat, converter, job, recipes
from flashmoe_train.integrations.torchtitan.checkpoints import Checkpoints
from flashmoe_train.integrations.torchtitan.expert_load import ExpertLoad
from flashmoe_train.monitor import Monitor, Step
from flashmoe_train.recipe import write
from flashmoe_train.schema import Model, Recipe
from flashmoe_train.swap import Report


def run(recipe: Recipe, command: str, allow_fallback: bool) -> None:
    """Trains the recipe in this process, one of those torchrun started. Console output comes from one process only.
    `command` is what the user typed, to suggest another."""
    early = _keep_log_lines()
    config = prepare(recipe, int(os.environ["WORLD_SIZE"]), allow_fallback)
    folder = Path(config.job.dump_folder)
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


def prepare(recipe: Recipe, world_size: int, allow_fallback: bool) -> JobConfig:
    """TorchTitan's configuration of the recipe, checked, and the folder of the run with what it needs in it."""
    resolved, config = recipes.resolve(recipe, world_size)
    if not allow_fallback:
        compat.check_kernels(converter.choices(config), config, job.model_args(resolved.tables))
    folder = Path(config.job.dump_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder of the run, {folder}, cannot be made: {error}") from None
    if config.model.hf_assets_path == data.BYTE_TOKENIZER:
        config.model.hf_assets_path = str(data.write_byte_tokenizer(folder / "byte_tokenizer"))
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

    def __init__(self, job_config: JobConfig) -> None:
        compat.provide_validator(job_config)
        super().__init__(job_config)
        compat.ask_for_no_masks(self)
        self.checkpointer.__class__ = Checkpoints
        _check_vocabulary(self)
        dims = self.parallel_dims
        other_tokens = dims.get_mesh("loss").get_group() if dims.dp_cp_enabled else None
        other_layers = dims.get_mesh("pp").get_group() if dims.pp_enabled else None
        self.expert_load = ExpertLoad(self.model_parts, other_tokens, other_layers)
        metrics = self.metrics_processor
        if dist.get_rank() == _get_metrics_rank(dims, job_config):  # the one that knows the loss
            title = f"{job_config.model.name} on {dist.get_world_size()} × {self.device.type}"
            self.monitor = Monitor(title, Path(job_config.job.dump_folder), job_config.training.steps)
        metrics.logger = _Metrics(metrics.logger, self.expert_load, self.monitor)

    def forward_backward_step(self, **batch: Any) -> Any:
        watched = bool(self.expert_load.blocks) and self.metrics_processor.should_log(self.step)
        before = self.expert_load.counts() if watched else None
        loss = super().forward_backward_step(**batch)
        if before is not None:
            self.expert_load.add(before, batch["labels"].numel() // self.parallel_dims.cp)
        return loss

    def train(self) -> None:
        super().train()
        # The loss on held-out data belongs into the summary, whatever validation.freq is.
        if self.job_config.validation.enable and not self.validator.should_validate(self.step):
            self.validator.validate(self.model_parts, self.step)

    def export(self, model: Model | None) -> None:
        """Writes the weights in Hugging Face's format, with a config.json if the recipe has the model's sizes."""
        config = self.job_config
        files = {}
        if model is not None:
            tokens = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": self.tokenizer.eos_id}
            dtype, seq_len = config.checkpoint.export_dtype, config.training.seq_len
            files["config.json"] = huggingface.config(model, seq_len, dtype, tokens)
        folder = Path(config.job.dump_folder) / "huggingface"
        self.checkpointer.export(folder, files, Path(config.model.hf_assets_path))

    def summarise(self, command: str) -> None:
        if self.monitor is None:
            return
        config = self.job_config
        self.monitor.finish(
            swaps=converter.FlashMoEConverter.last_report or Report(),
            tensorboard=Path(config.job.dump_folder) / config.metrics.save_tb_folder,
            unigram_entropy=data.unigram_entropy() if config.training.dataset == "torch_sources" else None,
            next_command=f"{command} training.steps={2 * config.training.steps}",
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


def _check_vocabulary(trainer: Trainer) -> None:
    """A token that the embedding does not have would end in an index error, or on a GPU in an assertion."""
    tokens, rows = trainer.tokenizer.get_vocab_size(), trainer.model_args.vocab_size
    if tokens > rows:
        raise UsageError(f"the tokenizer has {tokens} tokens, the model's vocab_size is {rows}: it must not be less")
