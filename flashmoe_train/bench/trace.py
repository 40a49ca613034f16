"""What a trace of torch.profiler says of one training step: which kinds of kernels took how long, what of the
communication was hidden behind computation, how often the host waited.

On a GPU the slices of time are its kernels, copies and fills; on a CPU they are operators, each without those it calls.
"""

import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe_train.bench.kernel_names import short_name

# Kinds of kernels and of operators, by names; the first that matches counts. A compiled kernel is named after all
# operators in it; one from a template is a product of matrices or flex attention, which may be named after neither.
PARTS = {
    "our attention": r"flashmoe\b.*\b(forward|backward|prepare|convert|list)_kernel\b|^flashmoe::attention",
    "our exchange": r"flashmoe\b.*\b(plan|dispatch|receive|return|sum|wait)_kernel\b|^flashmoe::ep_",
    "our mixture of experts": r"flashmoe\b",
    "other attention": (
        r"^triton_tem(?!.*mm)|flex_attention|flash_(fwd|bwd)|fmha|sdpa|scaled_dot_product|_varlen_attn|flash_attn"
    ),
    "exchange": r"SendRecv|all_?to_?all",
    "all-gather": r"ncclDev\w*AllGather|gloo:all_?gather|c10d\w*::_?all_?gather",
    "reduce-scatter": r"ReduceScatter|gloo:reduce_?scatter|c10d\w*::_?reduce_?scatter",
    "other collectives": r"ncclDev|^gloo:|c10d\w*::",
    "grouped GEMM": r"GroupProblemShape|grouped_(gemm|mm)",
    "dense GEMM": r"^triton_tem|nvjet|gemm|gemv|cutlass|splitK|xmma|aten::(mm|bmm|addmm|baddbmm|_scaled_mm)$",
    "compiled elementwise": r"^triton_",
    "copies, casts and fills": (
        r"copy|Memcpy|Memset|FillFunctor|CatArray|chunk_cat|aten::(cat|clone|fill_|zero_|stack|_chunk_cat)$"
    ),
    "optimizer and clipping": r"adam|multi_tensor_apply|LpNorm|_foreach_|linalg_vector_norm",
    "index, scatter, sort": (
        r"index|scatter|gather|sort|topk|hist|bincount|cumsum|scan|searchsorted|unique|nonzero|fill_indices|embedding"
    ),
    "elementwise and reductions": (
        r"elementwise|reduce|softmax|norm|loss|Functor|"
        r"aten::(mul|add|sub|div|pow|rsqrt|sum|mean|silu|sigmoid|neg|exp|where|clamp|max|lt|ge|eq|masked_fill|rsub)\w*$"
    ),
    "other": r"",
}
COMMUNICATION = ("our exchange", "exchange", "all-gather", "reduce-scatter", "other collectives")
_PATTERNS = [(part, re.compile(pattern, re.I)) for part, pattern in PARTS.items()]

# How the host waits for the device, by what the trace calls it.
WAITS = {
    "stream, event or device awaited": r"^cuda(Stream|Event|Device)Synchronize$",
    "copies to the host": r"^Memcpy DtoH",
    "values read by the host": r"^aten::_local_scalar_dense$",
}
HEAVIEST = 20  # kernels that are listed by name


@dataclass(frozen=True)
class Slice:
    """Something the device did, in microseconds."""

    begin: float
    end: float
    name: str

    @property
    def part(self) -> str:
        return part_of(self.name)


def part_of(name: str) -> str:
    """The kind of a kernel or operator, a key of PARTS."""
    return next(part for part, pattern in _PATTERNS if pattern.search(name))


def summarise(path: Path) -> dict[str, Any]:
    """Of a trace in Chrome's format: by part the milliseconds, those of them that were hidden behind computation, and
    launches; the time in which the device did anything; the heaviest kernels; how often the host waited."""
    events = [event for event in json.loads(path.read_bytes())["traceEvents"] if event.get("ph") == "X"]
    found = slices(events)
    alone = partition(found)
    parts: dict[str, dict[str, float]] = {}
    kernels: dict[str, dict[str, Any]] = {}
    for one, exposed in zip(found, alone, strict=True):
        ms = (one.end - one.begin) / 1e3
        part = parts.setdefault(one.part, {"ms": 0.0, "hidden": 0.0, "launches": 0})
        kernel = kernels.setdefault(one.name, {"part": one.part, "ms": 0.0, "launches": 0})
        for counted in (part, kernel):
            counted["ms"] += ms
            counted["launches"] += 1
        part["hidden"] += ms - exposed / 1e3
    heaviest = sorted(kernels.items(), key=lambda item: (-item[1]["ms"], item[0]))[:HEAVIEST]
    names = Counter(event["name"] for event in events)
    return {
        "parts": {name: parts[name] for name in PARTS if name in parts},
        "busy_ms": sum(alone) / 1e3,
        "kernels": [{"name": short_name(name)[:160]} | about for name, about in heaviest],
        "waits": {
            wait: sum(count for name, count in names.items() if re.search(pattern, name))
            for wait, pattern in WAITS.items()
        },
    }


def slices(events: Sequence[dict[str, Any]]) -> list[Slice]:
    """What the GPU did or, in a trace without one, the CPU's operators."""
    device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device:
        return [Slice(event["ts"], event["ts"] + event["dur"], event["name"]) for event in device]
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" or event["name"].startswith("gloo:"):
            threads.setdefault(event["tid"], []).append(event)
    return [one for thread in threads.values() for one in _innermost(thread)]


def _innermost(events: Iterable[dict[str, Any]]) -> Iterator[Slice]:
    """The times in which an operator of a thread has not called another one."""
    open_: list[tuple[float, str]] = []  # when each of those that call each other ends
    now = 0.0

    def close(until: float) -> Iterator[Slice]:
        nonlocal now
        while open_ and open_[-1][0] <= until:
            end, name = open_.pop()
            if end > now:
                yield Slice(now, end, name)
                now = end

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin = event["ts"]
        yield from close(begin)
        if open_ and begin > now:
            yield Slice(now, begin, open_[-1][1])
        now = begin
        end = begin + event["dur"]
        open_.append((min(end, open_[-1][0]) if open_ else end, event["name"]))
    yield from close(float("inf"))


def partition(found: Sequence[Slice]) -> list[float]:
    """Of each slice the microseconds that are its own: where several are at work at once, the time belongs to
    computation before communication, then to who began first. The sum is the time in which anything was at work."""
    own = [0.0] * len(found)
    keys = [(one.part in COMMUNICATION, one.begin, number) for number, one in enumerate(found)]
    begins = sorted(range(len(found)), key=lambda number: found[number].begin)
    times = sorted({time for one in found for time in (one.begin, one.end)})
    at_work: list[tuple[bool, float, int]] = []
    next_ = 0
    for time, until in itertools.pairwise(times):
        while next_ < len(begins) and found[begins[next_]].begin <= time:
            heapq.heappush(at_work, keys[begins[next_]])
            next_ += 1
        while at_work and found[at_work[0][2]].end <= time:
            heapq.heappop(at_work)
        if at_work:
            own[at_work[0][2]] += until - time
    return own
