"""Megatron's distributed checkpoints under a recipe: in `checkpoint/step-N` of the run's folder.

Stock and swapped models, on any layout of processes, load what the others have saved.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import checkpoint_files
from flashmoe_train.integrations.megatron import compat

_KEEP = 10  # as under TorchTitan


def is_complete(folder: Path) -> bool:
    return (folder / "metadata.json").is_file()


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first: unfinished ones have another name."""
    return checkpoint_files.steps(folder, is_complete)


class Checkpoints:
    """Saves and loads one run: the model without wrappers, its optimizer, the schedule of the learning rate."""

    def __init__(
        self,
        folder: Path,
        wrapped: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        keep: int | None,
        asynchronous: bool = False,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.folder, self.wrapped, self.model = folder, wrapped, model
        self.optimizer, self.scheduler, self.keep = optimizer, scheduler, keep or _KEEP
        # Of this run alone: a process that writes for a run that was killed may still be at it.
        own = [f"unfinished-{time.time_ns()}"]
        dist.broadcast_object_list(own, 0)
        self.unfinished = folder / own[0]
        self.writing = AsyncCallsQueue() if asynchronous else None  # at most one checkpoint at once
        self.metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }

    def save(self, step: int, position: dict[str, int]) -> None:
        """All processes call it; `position` is where the data goes on. A run that is killed in between leaves the
        checkpoint before as the newest. An asynchronous one is a copy from now on, which another process writes."""
        from megatron.core import dist_checkpointing

        self.finish()
        if dist.get_rank() == 0:
            for left in self.folder.glob("unfinished*"):
                shutil.rmtree(left, ignore_errors=True)
            self.unfinished.mkdir(parents=True)
        dist.barrier()
        with compat.complete_parameters(self.wrapped):
            state = self._state(loading=False) | {"step": step, "position": position}
            later = dist_checkpointing.save(state, str(self.unfinished), async_sharded_save=self.writing is not None)
            if self.writing is not None:
                later.add_finalize_fn(lambda: self._publish(step))
                self.writing.schedule_async_request(later)
        if self.writing is None:
            dist.barrier()
            self._publish(step)

    def _publish(self, step: int) -> None:
        if dist.get_rank() == 0:
            path = self.folder / f"step-{step}"
            shutil.rmtree(path, ignore_errors=True)
            self.unfinished.rename(path)
            for old in complete(self.folder)[self.keep :]:
                shutil.rmtree(old)
        dist.barrier()

    def poll(self) -> None:
        """Gives a checkpoint its name if all processes have written it. All of them call it, once a step."""
        if self.writing is not None:
            self.writing.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Waits until the checkpoint in the making is complete. All processes call it."""
        if self.writing is not None:
            self.writing.maybe_finalize_async_calls(blocking=True)

    def resume(self) -> tuple[int, dict[str, int]]:
        """Loads the newest checkpoint, if there is one; returns its step, else 0, and where its data goes on."""
        found = complete(self.folder)
        dist.barrier()  # before anybody saves another
        if not found:
            return 0, {}
        path = found[0]
        compat.before_loading(self.optimizer)
        groups = self.optimizer.param_groups
        rates = [{key: group[key] for key in ("max_lr", "min_lr") if key in group} for group in groups]
        state = _load(self._state(loading=True), path, found)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler.override_opt_param_scheduler:  # the recipe's schedule, of which groups hold a part
            for group, own in zip(self.optimizer.param_groups, rates, strict=True):
                group.update(own)
        self.scheduler.load_state_dict(state["scheduler"])
        compat.after_loading(self.optimizer)
        return state["step"], state.get("position", {})

    def load_weights(self, path: Path) -> None:
        """Weights alone, of one of our checkpoints or of Megatron's own training script."""
        state = _load({"model": self.model.sharded_state_dict(metadata=self.metadata)}, path, [])
        self.model.load_state_dict(state["model"])
        self.optimizer.reload_model_params()

    def _state(self, loading: bool) -> dict[str, Any]:
        model = self.model.sharded_state_dict(metadata=self.metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=self.metadata)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}


def _load(wanted: dict[str, Any], path: Path, own: Sequence[Path]) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    if checkpoint_files.is_complete(path):  # else of another of Megatron's formats
        checkpoint_files.check(path, own, path.parent)
    try:
        return dist_checkpointing.load(wanted, str(path))
    except (CheckpointingException, CheckpointException, KeyError) as error:
        raise UsageError(f"{path} does not fit the model: {error}") from None
