"""Checkpoints under a recipe: TorchTitan's own manager, and what keeps a run from losing one.

A run resumes from the newest complete checkpoint in its folder. What TorchTitan leaves open is closed here:

- a checkpoint that a killed run has left half written is removed, not counted among those to keep, and not taken as the
  reason to forget the weights that the run was to start from;
- saving over an existing checkpoint first makes that one incomplete, so that a kill cannot mix the two;
- a checkpoint with a damaged file is refused with the file's name, and with the older one that is whole;
- a checkpoint that does not fit is refused with the names that differ, before any tensor is read;
- weights in Hugging Face's format are exported beside the checkpoints, not as one that cannot be resumed.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard
from torchtitan.components.checkpoint import MODEL, OPTIMIZER, AsyncMode, CheckpointManager

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import checkpoint_files
from flashmoe_train.integrations.checkpoint_files import is_complete, steps
from flashmoe_train.integrations.torchtitan import generation

models = generation.part("models")

# Hugging Face's files of a model may lack these: a model that was trained without them has them at zero.
_OPTIONAL = ("e_score_correction_bias",)


def is_huggingface(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


class Checkpoints(CheckpointManager):
    """Takes over a CheckpointManager that TorchTitan's trainer has made: `manager.__class__ = Checkpoints`."""

    def load(self, step: int = -1) -> bool:
        if self.enable and not self.load_only:
            self._remove_incomplete()
        return super().load(step)

    def _remove_incomplete(self) -> None:
        folder = Path(self.folder)
        if dist.get_rank() == 0 and folder.is_dir():
            for path in folder.glob("step-*"):
                if path.is_dir() and not is_complete(path) and not is_huggingface(path):
                    shutil.rmtree(path)
            if not any(folder.iterdir()):
                folder.rmdir()  # or TorchTitan would not load the weights to start from
        dist.barrier()

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        if from_quantized:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        elif from_hf:
            self._load_huggingface(state_dict, checkpoint_id)
        elif not is_complete(Path(checkpoint_id)):
            found = "is in Hugging Face's format" if is_huggingface(Path(checkpoint_id)) else "is no checkpoint"
            raise UsageError(f"{checkpoint_id} {found}: a run cannot go on with it")
        else:
            self._check_files(Path(checkpoint_id))
            saved = FileSystemReader(checkpoint_id).read_metadata()
            if OPTIMIZER in state_dict and not any(name.startswith("optimizer.") for name in saved.state_dict_metadata):
                raise UsageError(
                    f"{checkpoint_id} holds weights alone: a run can start from it, but not go on with it. Save whole "
                    "checkpoints by [checkpoint] every, or checkpoint.last_save_model_only = false"
                )
            self._check(checkpoint_id, self.states[MODEL].state_dict(), _model(saved))
            if "dataloader" in state_dict:
                self._check_readers(checkpoint_id, saved)
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def _check_files(self, checkpoint: Path) -> None:
        """Raises UsageError if a file of the checkpoint is not what was written; says which older one is whole."""
        folder = Path(self.folder)
        checkpoint_files.check(checkpoint, steps(folder), folder)

    def _load_huggingface(self, state_dict: dict[str, Any], folder: str) -> None:
        assert self.sd_adapter is not None
        wanted = self.sd_adapter.to_hf(self._with_whole_heads(state_dict))
        saved = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
        missing = {name for name in wanted if name not in saved and name.endswith(_OPTIONAL)}
        wanted = {name: tensor for name, tensor in wanted.items() if name not in missing}
        self._check(folder, wanted, {name: item for name, item in saved.items() if not name.endswith("inv_freq")})
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(folder))
        self.states[MODEL].load_state_dict(self.sd_adapter.from_hf(wanted))

    def _check(self, path: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Raises UsageError unless the tensors of the checkpoint are those of the model, in name and shape."""
        problems = [f"{name} is not in it" for name in wanted if name not in saved]
        for name, tensor in wanted.items():
            item = saved.get(name)
            if isinstance(item, TensorStorageMetadata) and item.size != tensor.shape:
                problems.append(f"{name} is {list(item.size)} there and {list(tensor.shape)} here")
        # A stage of a pipeline has some of the layers; all processes have to come to the same end.
        stages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stages, (tuple(wanted), problems))
        names = set().union(*(stage_names for stage_names, _ in stages))
        every = list(dict.fromkeys(problem for _, found in stages for problem in found))
        every += [f"{name} is not in the model" for name in sorted(set(saved) - names)]
        if every:
            more = f" and {len(every) - 3} more" if len(every) > 3 else ""
            raise UsageError(f"{path} does not fit the model: {'; '.join(every[:3])}{more}")

    def _check_readers(self, path: str, saved: Metadata) -> None:
        """Raises UsageError if other processes than these have read the data: where each was is in the checkpoint."""
        readers = {name.split(".")[1] for name in saved.state_dict_metadata if name.startswith("dataloader.dp_rank_")}
        now = self.states["dataloader"].dp_world_size
        if len(readers) != now:
            raise UsageError(
                f"{path} was saved by {len(readers)} data-parallel processes, these are {now}, and each has read its "
                "own part of the data. A run can start from its weights ([checkpoint] start_from, in another folder),"
                " or go on with optimizer and schedule, reading the data from the beginning: [torchtitan.checkpoint]"
                ' exclude_from_loading = ["dataloader"]'
            )

    def _with_whole_heads(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Gathers the query and key projections whose heads are cut: TorchTitan's adapter reorders the rows of a head,
        and where a process has only some of them, DTensor's view comes out wrong (llama3 on more processes than heads).
        """
        heads = dict(zip(("wq.weight", "wk.weight"), models.heads(self.sd_adapter), strict=True))
        whole = dict(weights)
        for name, tensor in weights.items():
            count = next((count for end, count in heads.items() if name.endswith(end)), None)
            if count is not None and isinstance(tensor, DTensor):
                cuts = [
                    size for size, p in zip(tensor.device_mesh.shape, tensor.placements, strict=True) if p == Shard(0)
                ]
                if count % math.prod(cuts):
                    whole[name] = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
        return whole

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **options: Any) -> Any:
        if dist.get_rank() == 0:
            (Path(checkpoint_id) / ".metadata").unlink(missing_ok=True)
        dist.barrier()
        return super().dcp_save(state_dict, checkpoint_id, *args, **options)

    def export(self, folder: Path, files: Mapping[str, Any], tokenizer: Path) -> None:
        """Writes the weights as Hugging Face's safetensors into `folder`, with JSON `files` and the tokenizer's."""
        assert self.sd_adapter is not None
        self.sd_adapter.fqn_to_index_mapping = None  # of the tokenizer's model, which need not be this one
        weights = {name: tensor.to(self.export_dtype) for name, tensor in self.states[MODEL].state_dict().items()}
        self.dcp_save(self._with_whole_heads(weights), str(folder), AsyncMode.DISABLED, to_hf=True)
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "sharded", ignore_errors=True)
            if (single := folder / "model-00001-of-00001.safetensors").exists():
                single.rename(folder / "model.safetensors")  # the name that needs no index
                (folder / "model.safetensors.index.json").unlink(missing_ok=True)
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content, indent=1) + "\n")
            for path in (*tokenizer.glob("*token*.json"), *tokenizer.glob("*.model"), *tokenizer.glob("merges.txt")):
                shutil.copy(path, folder)
        dist.barrier()


def _model(saved: Metadata) -> dict[str, Any]:
    """The entries of a whole checkpoint that are the model's."""
    others = (f"{OPTIMIZER}.", "lr_scheduler.", "dataloader.", "train_state.")
    return {name: item for name, item in saved.state_dict_metadata.items() if not name.startswith(others)}
