"""A built variant in this process: its launch function, and what its watchdog has seen."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flashmoe_train.bench.variants import Study


class Hang(NamedTuple):
    """A wait that was given up (csrc/hopper/watchdog.cuh)."""

    block: tuple[int, int, int]
    thread: int
    barrier: int  # its address in shared memory
    parity: int


def summary(hangs: Sequence[Hang]) -> str:
    """For every barrier and parity that was waited for the first who did, and how many more, of those that the watchdog
    had room for."""
    waiting: dict[tuple[int, int], list[Hang]] = {}
    for hang in hangs:
        waiting.setdefault((hang.barrier, hang.parity), []).append(hang)
    parts = []
    for (barrier, parity), (first, *others) in waiting.items():
        block = ",".join(map(str, first.block)) if any(first.block[1:]) else first.block[0]
        more = f" and {len(others)} more warps" if others else ""
        parts.append(f"block {block} thread {first.thread}{more} at barrier {barrier:#x} parity {parity}")
    return "; ".join(parts)


class Library:
    def __init__(self, path: Path, study: Study, device: torch.device) -> None:
        self._library, self.device = ctypes.CDLL(str(path)), device
        self._library.launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._library.launch.restype = ctypes.c_char_p
        self._library.params_size.restype = ctypes.c_size_t
        if (size := self._library.params_size()) != ctypes.sizeof(study.params):
            found = ctypes.sizeof(study.params)
            raise TypeError(f"{study.params.__name__} has {found} bytes here and {size} in {study.source}")
        self._workspace = torch.empty(0, dtype=torch.int8, device=device)
        self._workspace_bytes = self._library.workspace_bytes if study.workspace else None
        if self._workspace_bytes is not None:
            self._workspace_bytes.restype = ctypes.c_int64
        self._records = None
        if hasattr(self._library, "watchdog"):
            self._library.watchdog.restype = ctypes.c_void_p
            address = self._library.watchdog()
            if not address:
                raise RuntimeError("the watchdog has no memory")
            # In the host's memory: to be read while a kernel hangs.
            self._records = (ctypes.c_uint32 * 8 * self._library.watchdog_records()).from_address(address)

    def launch(self, params: ctypes.Structure) -> None:
        if self._workspace_bytes is not None:
            params.workspace = self._space(self._workspace_bytes(ctypes.byref(params)))  # type: ignore[attr-defined]
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None
        if (error := self._library.launch(ctypes.byref(params), stream)) is not None:
            raise RuntimeError(error.decode())

    def _space(self, size: int) -> int:
        """The address of so many bytes, which hold what an earlier launch left there, if there was one."""
        if self._workspace.numel() < size:
            self._workspace = torch.full((size,), 99, dtype=torch.int8, device=self.device)
        return self._workspace.data_ptr()

    def hangs(self) -> list[Hang]:
        """Of the watchdog's build; of others always empty."""
        found = [list(record) for record in self._records or () if record[0]]
        return sorted(Hang((x, y, z), *rest) for _, x, y, z, *rest, _ in found)
