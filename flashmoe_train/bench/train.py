"""The bench `train_torchtitan`: a recipe trained as stock and with our operators, by the command a user would type.

Rows hold, for both, the median time of a step, tokens/s per device, peak memory per device and the loss of every step.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashmoe_train import launch
from flashmoe_train import recipe as recipes
from flashmoe_train.bench.measure import Bench, path
from flashmoe_train.bench.results import Row
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.compare import CHOICES, Run
from flashmoe_train.errors import UsageError
from flashmoe_train.ops import attention, moe
from flashmoe_train.ops.library import capability
from flashmoe_train.recipe import with_swap
from flashmoe_train.schema import Choice


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
        return (Case(pattern, launch.default_processes()),)

    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        if stopwatch.device.type == "cpu" and torch.cuda.is_available():
            raise UsageError("a recipe trains on this machine's GPUs: --device cpu is not possible here")
        row = Row(case=case.as_json(), label=case.label, flashmoe_path=_path(stopwatch.device.type))
        losses = dict[str, list[float]]()
        for name in CHOICES:
            try:
                run = _train(case, name)
            except launch.RunError as error:
                row.failed[name] = str(error)
                continue
            losses[name] = run.losses
            row.ms[name] = run.step_ms
            row.tokens_per_s_per_gpu[name] = run.tokens_per_s
            row.peak_gib[name] = run.peak_gib
        return row.model_copy(update={"loss": losses})


def _train(case: Case, choice: Choice) -> Run:
    recipe = recipes.load(case.recipe, case.overrides)
    with tempfile.TemporaryDirectory() as folder:
        return Run.of(launch.train(with_swap(recipe, choice, folder), case.gpus, allow_fallback=True, show=False))


def _path(device_type: str) -> str:
    attention_case = attention.AttentionCase(device_type, capability(device_type), torch.bfloat16, 128, 128)
    moe_case = moe.MoECase(device_type, capability(device_type), torch.bfloat16, 2048, 1024, 64)
    return path(attention.supports(attention_case) or moe.supports(moe_case), device_type)


BENCHES = (
    TrainBench(
        name="train_torchtitan",
        title="Training under TorchTitan",
        rate="tokens_per_s_per_gpu",
        standard=[Case("quickstart", launch.default_processes())],
        tiny=[
            Case("quickstart", min(2, launch.default_processes()), ("training.steps=8", "training.validate_steps=1"))
        ],
    ),
)
