"""The benches `train_torchtitan` and `train_megatron`: a recipe trained as stock and with our operators, by the command
a user would type. Megatron's stock is its own modules, without TransformerEngine.

Rows hold, for both, the median time of a step, tokens/s per device, peak memory per device and the loss of every step.
Cases that train long enough to compare losses have controls, which train stock again (CONTROLS). Their rows also hold
how far all of these are from the first run of stock, as a mean over the steps.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from flashmoe_train import launch
from flashmoe_train import recipe as recipes
from flashmoe_train.bench.measure import Bench, path
from flashmoe_train.bench.results import EVERYBODY, Row
from flashmoe_train.bench.timing import Stopwatch
from flashmoe_train.compare import CHOICES, Run
from flashmoe_train.errors import UsageError
from flashmoe_train.ops import attention, moe
from flashmoe_train.ops.library import capability
from flashmoe_train.recipe import with_swap
from flashmoe_train.schema import Checkpoint, Choice, Recipe

CONTROLS: dict[str, tuple[str, ...]] = {
    "stock_again": (),  # many of its kernels add in another order each time
    "stock_deterministic": ("training.deterministic=true",),  # for models of which stock repeats itself as it is
    "stock_other_seed": ("training.seed=1",),  # other first weights, the same text
}


@dataclass(frozen=True)
class Case:
    recipe: str
    gpus: int  # processes, where there is no GPU
    overrides: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((Path(self.recipe).stem, f"×{self.gpus}", *self.overrides))

    def as_json(self) -> dict[str, Any]:
        fields = {"recipe": self.recipe, "gpus": self.gpus}
        return fields | ({"overrides": list(self.overrides)} if self.overrides else {})


class TrainBench(Bench):
    def matching(self, pattern: str) -> Sequence[Any]:
        """Standard cases, or the recipe of that name or path, if it is of this framework: any can be measured."""
        if found := super().matching(pattern):
            return found
        if any(Bench.matching(bench, pattern) for bench in BENCHES):
            return ()
        framework = recipes.load(pattern).framework  # or there is no such recipe
        return (self.of_recipe(pattern),) if self.name.endswith(f"_{framework}") else ()

    def of_recipe(self, recipe: str) -> Case:
        return Case(recipe, launch.default_processes())

    def measure(self, case: Case, stopwatch: Stopwatch) -> Row:
        row = empty_row(case, stopwatch.device.type)
        if row.skipped:
            return row
        losses = dict[str, list[float]]()
        runs: dict[str, tuple[Case, Choice]] = {choice: (case, choice) for choice in CHOICES}
        for control in case.controls:
            runs[control] = replace(case, overrides=(*case.overrides, *CONTROLS[control])), "stock"
        for name, (of_case, choice) in runs.items():
            try:
                run = _train(of_case, choice)
            except launch.RunError as error:
                row.failed[name] = str(error)
                continue
            losses[name] = run.losses
            if name not in CHOICES:
                continue
            row.ms[name] = run.step_ms
            row.tokens_per_s_per_gpu[name] = run.tokens_per_s
            row.peak_gib[name] = run.peak_gib
        measured: dict[str, Any] = {"loss": losses}
        if len(runs) > len(CHOICES) and not row.failed:
            pairs = {name: [*zip(losses["stock"], losses[name], strict=True)] for name in runs if name != "stock"}
            measured["from_stock"] = {name: fmean(abs(a - b) for a, b in pair) for name, pair in pairs.items()}
        return row.model_copy(update=measured)


def empty_row(case: Case, device_type: str) -> Row:
    """Raises UsageError where the case cannot be measured on that device."""
    if device_type == "cpu" and torch.cuda.is_available():
        raise UsageError("a recipe trains on this machine's GPUs: --device cpu is not possible here")
    row = Row(case=case.as_json(), label=case.label, flashmoe_path=path_of_kernels(device_type))
    if device_type == "cuda" and torch.cuda.device_count() < case.gpus:
        row.skipped[EVERYBODY] = f"needs {case.gpus} GPUs, here are {torch.cuda.device_count()}"
    return row


def _train(case: Case, choice: Choice) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_as_measured(case, choice, folder)
        return Run.of(launch.train(recipe, case.gpus, allow_fallback=True, show=False))


def recipe_as_measured(case: Case, choice: Choice, folder: str) -> Recipe:
    """The case's recipe as it is measured: every step is logged unless it says otherwise, and no checkpoint is written,
    which for large models takes longer than the steps."""
    recipe = with_swap(recipes.load(case.recipe, case.overrides), choice, folder)
    start = recipe.checkpoint.start_from
    changes: dict[str, Any] = {"checkpoint": Checkpoint() if start is None else Checkpoint(start_from=start)}
    if recipe.framework == "torchtitan":
        metrics = {"log_freq": 1} | recipe.torchtitan.get("metrics", {})
        changes["torchtitan"] = recipe.torchtitan | {"metrics": metrics}
    return recipe.model_copy(update=changes)


def path_of_kernels(device_type: str) -> str:
    attention_case = attention.AttentionCase(device_type, capability(device_type), torch.bfloat16, 128, 128)
    moe_case = moe.MoECase(device_type, capability(device_type), torch.bfloat16, 2048, 1024, 64)
    return path(attention.supports(attention_case) or moe.supports(moe_case), device_type)


# Long enough to compare losses, for models of which every step takes a second. Who logs a step waits for it, and then
# the device for the host: TorchTitan's users log every tenth step, unless they ask for more.
SELDOM = "torchtitan.metrics.log_freq=5"
_LOSSES = ("training.steps=100", "training.warmup_steps=20", SELDOM)
_AGAIN = ("stock_again",)
OUR_EXCHANGE = "swap.dispatch=flashmoe"
_SMALL = ("training.steps=8", "training.seq_len=32", "training.validate_steps=1", "model.num_hidden_layers=2")

BENCHES = (
    TrainBench(
        name="train_torchtitan",
        title="Training under TorchTitan",
        rate="tokens_per_s_per_gpu",
        standard=[
            Case("quickstart", launch.default_processes(), controls=("stock_again", "stock_deterministic")),
            Case("llama3_debug", 1, ("training.steps=200", "training.seq_len=1024"), controls=_AGAIN),
            Case("llama3_8b_4layers", 1, ("training.global_batch_size=1",), controls=_AGAIN),
            Case("deepseek_v3_16b_4gpu", 4, (OUR_EXCHANGE, *_LOSSES), controls=("stock_again", "stock_other_seed")),
            Case("qwen3_30b_24layers_4gpu", 4, (OUR_EXCHANGE, *_LOSSES), controls=_AGAIN),
            Case("llama3_8b_4gpu", 4, _LOSSES, controls=_AGAIN),
            Case("llama3_8b_32k_4gpu", 4, _LOSSES, controls=_AGAIN),
            # A few layers of these models on one GPU and their halves on two: the memory is that of the parameters.
            Case("deepseek_v3_16b_4gpu", 1, ("model.num_hidden_layers=8", *_LOSSES), controls=_AGAIN),
            Case("qwen3_30b_24layers_4gpu", 1, ("model.num_hidden_layers=7", *_LOSSES), controls=_AGAIN),
            Case("deepseek_v3_16b_4gpu", 2, ("model.num_hidden_layers=13", OUR_EXCHANGE, *_LOSSES), controls=_AGAIN),
            Case("qwen3_30b_24layers_4gpu", 2, ("model.num_hidden_layers=12", OUR_EXCHANGE, *_LOSSES), controls=_AGAIN),
            Case("llama3_8b_4gpu", 2, _LOSSES, controls=_AGAIN),
        ],
        tiny=[Case("quickstart", min(2, launch.default_processes()), _SMALL)],
    ),
    TrainBench(
        name="train_megatron",
        title="Training under Megatron-core",
        rate="tokens_per_s_per_gpu",
        standard=[
            Case("megatron_llama3_8b_4layers", 2, ("training.steps=20",)),
            Case("megatron_qwen3_30b_4layers", 2, ("training.steps=20",)),
            Case("megatron_qwen3_30b_4layers", 2, ("training.steps=20", "swap.dispatch=flashmoe")),
        ],
        tiny=[Case("megatron_moe_debug", min(2, launch.default_processes()), _SMALL)],
    ),
)
