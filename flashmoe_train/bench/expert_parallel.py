"""The bench `expert_parallel`: the exchange of tokens between the GPUs of one machine, and a layer that needs it.

Rows are `dispatch`, `combine` and `layer_forward_backward` of a shape on W processes; every shape is one start of
torchrun, whose processes run `expert_parallel_worker`. GB/s are those of the least bytes a GPU has to send: each token
once to each other GPU that needs it.
"""

import functools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashmoe_train.bench.measure import Bench
from flashmoe_train.bench.results import EVERYBODY, Row
from flashmoe_train.bench.timing import Stopwatch

OPS = ("dispatch", "combine", "layer_forward_backward")


@dataclass(frozen=True)
class Case:
    name: str
    W: int
    T: int  # on each process
    d: int
    n: int  # 0: the exchange alone is measured
    E: int
    K: int
    op: str = OPS[0]
    device: str = "cuda"

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
        Case("Qwen3-30B", world, 8192, 2048, 768, 128, 8),
    )
    for row in case.rows()
]
_TINY = Case("tiny", 2, 24, 16, 8, 4, 2, device="cpu").rows()


class ExpertParallelBench(Bench):
    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        if case.device == "cuda" and torch.cuda.device_count() < case.W:
            reason = f"needs {case.W} GPUs, here are {torch.cuda.device_count()}"
            return Row(case=case.as_json(), label=case.label, skipped={EVERYBODY: reason})
        try:
            found = _measure_shape(replace(case, op=OPS[0]))[case.op]
        except subprocess.CalledProcessError as error:
            found = {"failed": {EVERYBODY: f"its processes ended with {error.returncode}: {error.stderr[-3000:]}"}}
        return Row.model_validate(found | {"case": case.as_json(), "label": case.label})


@functools.cache
def _measure_shape(case: Case) -> dict[str, dict[str, Any]]:
    """Rows by op, from processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.W}"]
        worker = ["-m", "flashmoe_train.bench.expert_parallel_worker", json.dumps(asdict(case)), str(out)]
        subprocess.run([sys.executable, *command, *worker], capture_output=True, text=True, check=True)
        return json.loads(out.read_text())


BENCHES = (
    ExpertParallelBench(
        name="expert_parallel", title="Expert parallelism", rate="gb_per_s", standard=_STANDARD, tiny=_TINY
    ),
)
