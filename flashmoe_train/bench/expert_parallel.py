"""The bench `expert_parallel`: the exchange of tokens between the GPUs of one machine, and a layer that needs it.

Rows are `dispatch`, `combine` and `layer_forward_backward` of a shape on W processes; every shape is one start of
torchrun, whose processes run `expert_parallel_worker`. GB/s are those of the least bytes a GPU has to send: each token
once to each other GPU that needs it.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashmoe_train.bench.measure import Bench
from flashmoe_train.bench.moe_cases import SHAPES
from flashmoe_train.bench.results import EVERYBODY, Row
from flashmoe_train.bench.timing import Stopwatch

OPS = ("dispatch", "combine", "layer_forward_backward")
LIMIT = 300  # seconds that the processes of a shape may take


@dataclass(frozen=True)
class Case:
    name: str
    W: int
    T: int  # on each process
    d: int
    n: int  # 0: the exchange alone is measured
    E: int
    K: int
    op: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} W{self.W} {self.op}"

    def as_json(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("W", "T", "d", "E", "K", "op")}
        return sizes | ({"n": self.n} if self.op == OPS[2] else {})

    def rows(self) -> list["Case"]:
        return [replace(self, op=op) for op in OPS if op != OPS[2] or self.n]


_STANDARD = [
    row
    for world in (2, 4)
    for case in (
        Case("DeepSeek-V3", world, 8192, 7168, 0, 256, 8),
        Case("Qwen3-30B", world, 8192, *SHAPES["Qwen3-30B"][1:]),
    )
    for row in case.rows()
]
_TINY = Case("tiny", 2, 24, 16, 8, 4, 2).rows()


class ExpertParallelBench(Bench):
    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        device = stopwatch.device.type
        row = Row(case=case.as_json(), label=case.label)
        if device == "cuda" and torch.cuda.device_count() < case.W:
            row.skipped[EVERYBODY] = f"needs {case.W} GPUs, here are {torch.cuda.device_count()}"
            return row
        shape = replace(case, op="")
        if case.op not in _measured.get(shape, {}):
            _measured[shape] = _measure_shape(shape, device)
        return row.model_copy(update=_measured[shape].pop(case.op))


# By shape and op, what its processes found and no row has yet.
_measured: dict[Case, dict[str, dict[str, Any]]] = {}


def _measure_shape(shape: Case, device: str) -> dict[str, dict[str, Any]]:
    """What goes into the rows of a shape, by op, from processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={shape.W}"]
        worker = ["-m", "flashmoe_train.bench.expert_parallel_worker", json.dumps(asdict(shape)), device, str(out)]
        try:
            subprocess.run(
                [sys.executable, *command, *worker], capture_output=True, text=True, check=True, timeout=LIMIT
            )
            return json.loads(out.read_text())
        except subprocess.CalledProcessError as error:
            problem = f"its processes ended with {error.returncode}: {error.stderr[-3000:]}"
        except subprocess.TimeoutExpired:
            problem = f"its processes did not end within {LIMIT} s"
    return {op: {"failed": {EVERYBODY: problem}} for op in OPS}


BENCHES = (
    ExpertParallelBench(
        name="expert_parallel", title="Expert parallelism", rate="gb_per_s", standard=_STANDARD, tiny=_TINY
    ),
)
