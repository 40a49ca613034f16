"""Trains a recipe with Megatron-core in this process: its parallelism, its optimizer, its schedules, and our progress
bar, summary and checkpoints around them."""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashmoe_train import data
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import Overflows, forget
from flashmoe_train.integrations.megatron import compat, cpu, recipes, specs, token_files, weights
from flashmoe_train.integrations.megatron.checkpoints import Checkpoints, is_complete
from flashmoe_train.integrations.megatron.expert_load import ExpertLoad
from flashmoe_train.integrations.megatron.recipes import Plan
from flashmoe_train.monitor import Monitor, Step
from flashmoe_train.recipe import write
from flashmoe_train.schema import Recipe

Losses = dict[str, Tensor]


def run(recipe: Recipe, command: str, allow_fallback: bool) -> None:
    """Trains the recipe in this process, one of those torchrun started. `command` is what the user typed."""
    plan = recipes.resolve(recipe, int(os.environ["WORLD_SIZE"]))
    if not allow_fallback:
        recipes.check_kernels(plan)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder of the run, {plan.folder}, cannot be made: {error}") from None
    _log_to(plan.folder / f"log_rank{os.environ['RANK']}.txt")
    if os.environ["RANK"] == "0":
        write(recipe, plan.folder / "recipe.toml")
    start_processes(plan)
    trainer = None
    try:
        trainer = Trainer(plan)
        trainer.train()
        if recipe.checkpoint.export == "huggingface":
            trainer.export()
        trainer.summarise(command)
    finally:
        if trainer is not None:
            trainer.close()
        stop_processes()


def _log_to(path: Path) -> None:
    """What Megatron and PyTorch log and warn goes to a file, the screen stays ours."""
    logging.captureWarnings(True)
    handler = logging.FileHandler(path)  # after what earlier runs in this folder said
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.root.setLevel(logging.INFO)
    logging.root.handlers[:] = [handler]


def start_processes(plan: Plan) -> None:
    """Makes this process one of Megatron's groups; torch.distributed is started if it is not yet."""
    cpu.apply()
    compat.apply()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config = plan.config
    if config.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or its products may not repeat
        torch.use_deterministic_algorithms(True)
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    torch.manual_seed(plan.seed)
    # A stage has layers that no other has, which begin differently.
    model_parallel_cuda_manual_seed(plan.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


def stop_processes() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def build_model(plan: Plan) -> Any:
    """Megatron's GPTModel, this process' part of it, with what the recipe swaps; on the CPU without a GPU."""
    compat.apply()
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config, swap = plan.config, plan.recipe.swap
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        nothing = swap.attention == "stock" and (swap.moe == "stock" or plan.model.moe is None)
        if not nothing or config.sequence_parallel:  # the norms, which stock has not
            spec = specs.swapped(spec, config, swap.attention, swap.moe, plan.sharing)
        return GPTModel(
            config,
            spec,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **plan.arguments,
        )


class Trainer:
    """The training loop."""

    def __init__(self, plan: Plan) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
        from megatron.core.transformer.module import Float16Module

        self.plan, config = plan, plan.config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Text can take hours to tokenise, and NCCL lets a process wait minutes.
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        self.tokenizer = self._tokenizer()
        self.training = self._open("train", plan.data.train, plan.steps * plan.layout.sequences)
        heldout = plan.data.heldout
        self.checks = plan.recipe.training.validate_steps or 16
        self.heldout = None
        if heldout is not None:
            self.heldout = self._open("heldout", heldout, self.checks * plan.layout.data)
        self.model = build_model(plan).to(self.device)
        whole = Float16Module(config, self.model) if config.bf16 or config.fp16 else self.model
        self.wrapped = DistributedDataParallel(config, plan.ddp, whole)
        self.wrapped.broadcast_params()
        self.optimizer = get_megatron_optimizer(plan.optimizer, [self.wrapped])
        self.scheduler = OptimizerParamScheduler(self.optimizer, **plan.scheduler)
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, self.optimizer.scale_loss
        config.no_sync_func = self.wrapped.no_sync
        if plan.ddp.overlap_param_gather and plan.ddp.align_param_gather:
            config.param_sync_func = self.wrapped.start_param_sync
        self.forward_backward = get_forward_backward_func()
        self.replicas = parallel_state.get_data_parallel_group()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.expert_load = ExpertLoad(
            self.model,
            parallel_state.get_tensor_and_data_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        self.overflows = None
        if plan.sharing is not None:
            self.overflows = Overflows(
                plan.recipe.swap.dispatch_capacity, "[swap] dispatch_capacity", self.device, logging.warning
            )
        chosen = plan.recipe.checkpoint
        self.checkpoints = Checkpoints(
            plan.folder / "checkpoint",
            self.wrapped,
            self.model,
            self.optimizer,
            self.scheduler,
            chosen.keep,
            bool(chosen.asynchronous),
        )
        layout, position = plan.layout, dict[str, int]()
        self.step = 0
        if chosen.model_fields_set - {"start_from", "export"}:
            self.step, position = self.checkpoints.resume()
        if (seq_len := position.get("seq_len", plan.seq_len)) != plan.seq_len:
            raise UsageError(
                f"[training] seq_len = {plan.seq_len}: {self.checkpoints.folder} is of a run with {seq_len}, and where"
                " its data goes on is counted in sequences of that length; a new run, in another folder, can start from"
                " its weights ([checkpoint] start_from)"
            )
        self.sequences = position.get("sequences", self.step * layout.sequences)  # that were trained on
        needed = self.sequences + (plan.steps - self.step) * layout.sequences
        if needed > plan.steps * layout.sequences:  # steps had more sequences before
            self.training = self._open("train", plan.data.train, needed)
        if self.step == 0 and chosen.start_from is not None:
            self._start_from(Path(chosen.start_from))
        self.swapped = specs.report(self.model)
        # One process knows the loss of the last stage and shows it.
        logs = self.last_stage and self.replicas.rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
        self.monitor: Monitor | None = None
        self.tensorboard: Any = None
        if logs:
            from torch.utils.tensorboard import SummaryWriter

            title = f"{plan.model.architecture} on {plan.layout.processes} × {self.device.type}"
            self.monitor = Monitor(title, plan.folder, plan.steps)
            self.tensorboard = SummaryWriter(str(plan.folder / "tb"))

    def _tokenizer(self) -> Path:
        named = self.plan.data.tokenizer
        if named != data.BYTE_TOKENIZER:
            return Path(named)
        folder = self.plan.folder / "byte_tokenizer"
        if dist.get_rank() == 0:
            data.write_byte_tokenizer(folder)
        dist.barrier()
        return folder

    def _open(self, name: str, source: Any, sequences: int) -> token_files.TokenFile:
        plan = self.plan
        if token_files.is_indexed(source):
            opened = token_files.open_indexed(source, plan.seq_len, plan.seed)
        else:
            path = plan.folder / "tokens" / f"{name}.bin"
            if dist.get_rank() == 0:
                needed = sequences * (plan.seq_len + 1)
                token_files.prepare(source, plan.data.text_column, self.tokenizer, path, needed)
            dist.barrier(self.patient)
            opened = token_files.open_prepared(path, plan.seq_len)
        opened.check_vocabulary(plan.model.vocab_size)
        return opened

    def _start_from(self, path: Path) -> None:
        if is_complete(path):
            self.checkpoints.load_weights(path)
        elif weights.is_huggingface(path):
            weights.load(self.model, self.plan, path)
            self.optimizer.reload_model_params()
        else:
            found = "holds neither a checkpoint of Megatron's (metadata.json) nor Hugging Face's *.safetensors"
            raise UsageError(f"[checkpoint] start_from = {str(path)!r}: {found}")

    def train(self) -> None:
        plan, chosen = self.plan, self.plan.recipe.checkpoint
        every = plan.recipe.training.validate_every or 10
        saves = bool(chosen.model_fields_set & {"every", "keep", "asynchronous"})
        self.wrapped.train()
        while self.step < plan.steps:
            self._train_step()
            self.checkpoints.poll()
            last = self.step == plan.steps
            if self.heldout is not None and (last or self.step % every == 0):
                self._validate()
            if saves and (last or (chosen.every is not None and self.step % chosen.every == 0)):
                self.checkpoints.save(self.step, {"sequences": self.sequences, "seq_len": plan.seq_len})
        self.checkpoints.finish()

    def _train_step(self) -> None:
        plan, layout = self.plan, self.plan.layout
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.expert_load.on = True
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._forward_backward(self._batches(self.training, self.sequences), layout.turns)
        succeeded, grad_norm = self._update()
        rate = self.optimizer.param_groups[0]["lr"]
        if succeeded:
            self.scheduler.step(increment=1)
        self.expert_load.on = False
        self.step += 1
        self.sequences += layout.sequences
        metrics = self.expert_load.take()
        loss = self._mean(losses)
        if self.monitor is None:
            return
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        tokens_per_s = layout.sequences * plan.seq_len / seconds / layout.processes
        dropped = metrics.get("expert_load/dropped_rows")
        self.monitor.log_step(
            Step(
                self.step,
                loss=loss,
                grad_norm=grad_norm,
                tokens_per_s=tokens_per_s,
                seconds=seconds,
                peak_gib=peak,
                expert_load=metrics.get("expert_load/max_over_mean"),
                dropped_rows=None if dropped is None else int(dropped),
            )
        )
        metrics |= {
            "loss_metrics/global_avg_loss": loss,
            "grad_norm": grad_norm,
            "lr": rate,
            "throughput(tps)": tokens_per_s,
            "memory/max_active(GiB)": peak,
        }
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, self.step)

    def _update(self) -> tuple[bool, float]:
        """Whether the optimizer took its step, and the gradients' norm, which it reads on the host anyway."""
        if self.overflows is not None:
            self.overflows.count()
            if self.overflows.report():
                self.optimizer.prepare_grads()
                return False, float(self.optimizer.get_grad_norm())
        succeeded, grad_norm, _ = self.optimizer.step()
        return succeeded, float(grad_norm)

    def _validate(self) -> None:
        assert self.heldout is not None
        self.wrapped.eval()
        with torch.no_grad():
            batches = self._batches(self.heldout, 0, at_once=1, turns=self.checks)
            losses = self._forward_backward(batches, self.checks, forward_only=True)
        self.wrapped.train()
        if self.overflows is not None:
            self.overflows.report_validation()
        loss = self._mean(losses)
        if self.monitor is not None:
            self.monitor.log_heldout(self.step, loss)
            self.tensorboard.add_scalar("validation_metrics/loss", loss, self.step)

    def _forward_backward(
        self, batches: Iterator[Tensor], turns: int, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        """What `_loss` gives of every turn, on the last stage."""
        return self.forward_backward(
            forward_step_func=self._forward,
            data_iterator=batches,
            model=[self.wrapped],
            num_microbatches=turns,
            seq_length=self.plan.seq_len,
            micro_batch_size=1 if forward_only else self.plan.layout.micro_batch,
            decoder_seq_length=self.plan.seq_len,
            forward_only=forward_only,
        )

    def _batches(
        self, tokens: token_files.TokenFile, first: int, at_once: int | None = None, turns: int | None = None
    ) -> Iterator[Tensor]:
        """This process' windows, from the first sequence of a step on."""
        layout = self.plan.layout
        at_once, turns = at_once or layout.micro_batch, turns or layout.turns
        numbers = first + torch.arange(turns * layout.data * at_once).view(turns, layout.data, at_once)
        for turn in numbers[:, self.replicas.rank()]:
            yield tokens.sequences(turn)

    def _forward(self, batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        tokens = next(batches).to(self.device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)
        return model(inputs, positions, None, labels=labels), _loss

    def _mean(self, losses: list[Losses]) -> float:
        """Over all turns and data-parallel processes; NaN on stages that have none."""
        if not self.last_stage:
            return float("nan")
        mean = torch.stack([found["loss"] for found in losses]).mean()
        dist.all_reduce(mean, group=self.replicas)
        return mean.item() / self.replicas.size()

    def export(self) -> None:
        """Writes the weights in Hugging Face's format; all processes call it."""
        with compat.complete_parameters(self.wrapped):
            weights.export(self.model, self.plan, self.tokenizer)

    def summarise(self, command: str) -> None:
        if self.monitor is not None:
            self.monitor.finish(
                swaps=self.swapped,
                tensorboard=self.plan.folder / "tb",
                unigram_entropy=data.entropy_for_scale(self.plan.data.train, self.tokenizer),
                next_command=f"{command} training.steps={2 * self.plan.steps}",
                overflows=self.overflows,
            )

    def close(self) -> None:
        forget()
        if self.monitor is not None:
            self.monitor.stop()
            self.tensorboard.close()


def _loss(losses: Tensor) -> tuple[Tensor, Losses]:
    """The mean over tokens `[batch, seq]`; what is logged is a copy, because schedules divide the loss in place."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}
