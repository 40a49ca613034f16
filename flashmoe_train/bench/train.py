"""The bench `train_torchtitan`: a recipe trained as stock and with our operators, by the command a user would type.

Rows hold, for both, the median time of a step, tokens/s per device, peak memory per device and the loss of every step.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flashmoe_train import recipe as recipes
from flashmoe_train.bench.measure import Bench, path
from flashmoe_train.bench.results import OURS, Row
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.errors import UsageError
from flashmoe_train.ops import attention, moe

STOCK = "stock"  # as OURS a value of the [flashmoe] table
WARMUP = 5  # steps that compile, allocate and fill caches


@dataclass(frozen=True)
class Case:
    recipe: str
    gpus: int  # processes, where there is no GPU
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((Path(self.recipe).stem, f"×{self.gpus}", *self.overrides))

    def as_json(self) -> dict[str, Any]:
        fields = {"recipe": self.recipe, "gpus": self.gpus}
        return fields | ({"overrides": list(self.overrides)} if self.overrides else {})


class TrainBench(Bench):
    def matching(self, pattern: str) -> Sequence[Case]:
        """The recipe of that name or path: any can be measured."""
        recipes.find(pattern)  # or there is no such recipe
        return (Case(pattern, _devices()),)

    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        if stopwatch.device.type == "cpu" and torch.cuda.is_available():
            raise UsageError("a recipe trains on this machine's GPUs: --device cpu is not possible here")
        row = Row(case=case.as_json(), label=case.label, flashmoe_path=_path(stopwatch.device.type))
        losses = dict[str, list[float]]()
        for name in (STOCK, OURS):
            with tempfile.TemporaryDirectory() as folder:
                summary = _train(case, name, folder)
            if isinstance(summary, str):
                row.failed[name] = summary
                continue
            steps = summary["steps"]
            losses[name] = [step["loss"] for step in steps]
            row.ms[name] = median(step["seconds"] for step in steps[WARMUP:] or steps) * 1e3
            row.tokens_per_s_per_gpu[name] = median(step["tokens_per_s"] for step in steps[WARMUP:] or steps)
            row.peak_gib[name] = summary["peak_gib_per_device"]
        return row.model_copy(update={"loss": losses})


def _train(case: Case, choice: str, folder: str) -> dict[str, Any] | str:
    """The summary of a run, or what it printed last."""
    overrides = [*case.overrides, f"flashmoe.attention={choice}", f"flashmoe.moe={choice}", f"job.dump_folder={folder}"]
    command = [
        sys.executable,
        "-m",
        "flashmoe_train.cli",
        "train",
        str(recipes.find(case.recipe).resolve()),
        *overrides,
    ]
    done = subprocess.run(
        [*command, f"--processes={case.gpus}", "--allow-fallback"], capture_output=True, text=True, cwd=folder
    )
    if done.returncode != 0:
        printed = (done.stderr + done.stdout).split("\n")
        return next((line for line in reversed(printed) if line.strip()), f"ended with {done.returncode}")
    return json.loads((Path(folder) / "summary.json").read_text())


def _path(device_type: str) -> str:
    attention_case = attention.AttentionCase(device_type, torch.bfloat16, 128, 128)
    moe_case = moe.MoECase(device_type, torch.bfloat16)
    return path(attention.supports(attention_case) or moe.supports(moe_case), device_type)


def _devices() -> int:  # what `flashmoe train` takes
    return torch.cuda.device_count() or 2


BENCHES = (
    TrainBench(
        name="train_torchtitan",
        title="Training under TorchTitan",
        rate="tokens_per_s_per_gpu",
        standard=[Case("quickstart", _devices())],
        tiny=[Case("quickstart", 2, ("training.steps=8", "validation.enable=false"))],
    ),
)
