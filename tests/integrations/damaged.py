"""Checkpoints that are not what was written."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist


@contextlib.contextmanager
def changed(path: Path, change: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """A file of a checkpoint with other contents, or without it."""
    before = path.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        after = change(before)
        path.unlink() if after is None else path.write_bytes(after)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(before)
    dist.barrier()


def flipped(content: bytes) -> bytes:
    """One bit is another, in the middle of the largest tensor."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
