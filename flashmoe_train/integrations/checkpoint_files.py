"""Whether the files of a checkpoint in PyTorch's distributed format, which TorchTitan and Megatron-core write, are what
was written: all there, whole, and every byte of every tensor.

Each tensor lies in a file as `torch.save` writes it, an archive with a checksum of its contents. Reading them does not
look at the checksums: a flipped bit would become a weight.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

from flashmoe_train.errors import UsageError

_METADATA = ".metadata"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint of that format: its metadata is written last."""
    return (folder / _METADATA).is_file()


def steps(folder: Path, complete: Callable[[Path], bool] = is_complete) -> list[Path]:
    """The checkpoints of a run that are complete, the newest first."""
    found = {path: path.name.removeprefix("step-") for path in folder.glob("step-*") if complete(path)}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: -int(found[path]))


def check(checkpoint: Path, own: Sequence[Path], folder: Path) -> None:
    """Raises UsageError if a file of a complete checkpoint is not what was written; says which older one of the run in
    `folder`, whose `own` are the newest first, is whole. Called by all processes."""
    problem = damage(checkpoint)
    if problem is None:
        return
    older = own[own.index(checkpoint) + 1 :] if checkpoint in own else []
    whole = next((path for path in older if damage(path) is None), None)
    if whole is not None:
        step = whole.name.removeprefix("step-")
        hint = f"{whole} is whole: remove {checkpoint} and the run goes on from step {step}"
    else:
        hint = f"there is no older one in {folder} that is whole"
    raise UsageError(f"{problem}. A run cannot go on with this checkpoint; {hint}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a complete checkpoint: the first file and why; None if nothing is. Called by all processes,
    each of which reads its share of the files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone: list[str | None] = [None] * world
    dist.all_gather_object(everyone, next(_damage(checkpoint, rank, world), None))
    return next(filter(None, everyone), None)


def _damage(checkpoint: Path, rank: int, world: int) -> Iterator[str]:
    try:
        stored = FileSystemReader(checkpoint).read_metadata().storage_data
    except Exception as error:  # of unpickling, which may raise anything
        yield f"{checkpoint / _METADATA} cannot be read ({type(error).__name__})"
        return
    files: dict[str, list[_StorageInfo]] = {}
    for entry in stored.values():
        files.setdefault(entry.relative_path, []).append(entry)
    for name, entries in sorted(files.items())[rank::world]:
        if problem := _damage_of_file(checkpoint / name, entries):
            yield problem


def _damage_of_file(path: Path, entries: Sequence[_StorageInfo]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size, wanted = path.stat().st_size, max(entry.offset + entry.length for entry in entries)
    if size < wanted:
        return f"{path} is cut off: {size:,} bytes of {wanted:,}"
    with path.open("rb") as file:
        for entry in sorted(entries, key=lambda entry: entry.offset):
            file.seek(entry.offset)
            try:
                whole = zipfile.ZipFile(io.BytesIO(file.read(entry.length))).testzip() is None
            except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError):
                whole = False
            if not whole:
                return f"{path} is damaged: what lies at byte {entry.offset:,} is not what was written"
    return None
