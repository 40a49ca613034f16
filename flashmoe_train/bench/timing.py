"""How long implementations take, side by side: medians of runs that take turns, each starting with a cold L2 cache."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Run = Callable[[], object]


class Stopwatch:
    """Times runs on one device: by CUDA events on a GPU, by the host's clock elsewhere.

    Before each timed run on a GPU a buffer larger than the L2 cache is written, so that no input is found there.
    `seconds` is about how much time one implementation gets, within `rounds` (least, most) of them. `align` is called
    before every run that is timed: processes that measure together wait for each other there.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float | None = None,
        rounds: tuple[int, int] | None = None,
        align: Callable[[], object] = lambda: None,
    ) -> None:
        self.device, self.align = device, align
        on_gpu = device.type == "cuda"
        # Times on a CPU prove that a bench works; nobody quotes them.
        self.seconds = seconds if seconds is not None else 0.75 if on_gpu else 0.02
        self.rounds = rounds or ((5, 60) if on_gpu else (3, 5))
        self._buffer: torch.Tensor | None = None
        self._flush_ms = 0.0
        if on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(4 * cache, dtype=torch.int8, device=device)
            self._flush_ms = self._time_flush(self._buffer)

    def medians(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Median milliseconds of each. The implementations take turns, so that clocks and heat are the same for all."""
        if not runs:
            return {}
        estimates, flushes = {}, {}
        for name, run in runs.items():
            run()
            self._synchronize()
            begin = time.perf_counter()
            run()
            host_ms = (time.perf_counter() - begin) * 1e3
            self._synchronize()
            # While the buffer is written the host gets ahead: the time between the events is then the GPU's alone.
            # The limit is for implementations that wait for the GPU themselves.
            flushes[name] = min(20, math.ceil(1.5 * host_ms / self._flush_ms)) if self._flush_ms else 0
            reading = self._start(run, flushes[name])
            self._synchronize()
            estimates[name] = reading()
        count = {name: self._count(estimate) for name, estimate in estimates.items()}
        total = max(count.values())
        names = list(runs)
        readings: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
        for turn in range(total):
            shift = turn % len(names)  # nobody always follows the same neighbour
            for name in names[shift:] + names[:shift]:
                # An implementation that gets fewer rounds has them spread over all.
                if (turn + 1) * count[name] // total > turn * count[name] // total:
                    readings[name].append(self._start(runs[name], flushes[name]))
        self._synchronize()
        return {name: median(reading() for reading in readings[name]) for name in names}

    def peak_gib(self, run: Run) -> float:
        """The most memory that a run needs beside what is there already; its results count. GPUs only."""
        gc.collect()
        self._synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self._synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**30

    def _count(self, estimate_ms: float) -> int:
        least, most = self.rounds
        return min(most, max(least, int(self.seconds * 1e3 / max(estimate_ms, 1e-6))))

    def _start(self, run: Run, flushes: int) -> Callable[[], float]:
        """Starts a run and returns what tells its milliseconds, on a GPU once it is synchronised."""
        if self._buffer is None:
            self.align()
            begin = time.perf_counter()
            run()
            ms = (time.perf_counter() - begin) * 1e3
            return lambda: ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(max(1, flushes)):
            self._buffer.zero_()
        self.align()
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _time_flush(self, buffer: torch.Tensor) -> float:
        readings = [self._start(buffer.zero_, 1) for _ in range(10)]
        self._synchronize()
        return max(1e-3, median(reading() for reading in readings))
