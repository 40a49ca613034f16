"""The program that torchrun starts on every process: `torchrun ... -m flashmoe_train.train RECIPE [key=value ...]`."""

import os
import sys
from typing import Annotated, Any

import torch
import typer

from flashmoe_train import recipe as recipes
from flashmoe_train.errors import UsageError
from flashmoe_train.ops.attention import AttentionCase, supports

Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that ships with the package.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="table.key=value: replaces a value of the recipe.", show_default=False)
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Train on PyTorch's own kernels where ours are missing.")
]


def check_kernels(allow_fallback: bool) -> None:
    """Nobody trains slowly by accident: on a Hopper GPU missing kernels are an error."""
    if allow_fallback or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return
    reason = supports(AttentionCase("cuda", torch.bfloat16, 128, 128))
    if reason is not None:
        raise UsageError(f"{reason}; --allow-fallback trains on PyTorch's kernels instead")


def train(recipe: str, overrides: list[str], allow_fallback: bool) -> None:
    """Trains a recipe in this process; all processes of the run call it."""
    check_kernels(allow_fallback)
    job = recipes.load(recipes.find(recipe), overrides)
    from flashmoe_train.integrations.torchtitan import runner

    runner.run(with_defaults(job), next_command=f"flashmoe train {recipe} training.steps=200")


def with_defaults(job: dict[str, Any]) -> dict[str, Any]:
    """TorchTitan's defaults name files of its own repository and GPU settings; these run anywhere. And -1 stands for
    all processes in the degree of expert parallelism too."""
    parallelism = job.get("parallelism", {})
    if parallelism.get("expert_parallel_degree") == -1:
        parallelism["expert_parallel_degree"] = int(os.environ["WORLD_SIZE"])
    job.setdefault("model", {}).setdefault("hf_assets_path", "bytes")
    training = job.setdefault("training", {})
    training.setdefault("dataset", "torch_sources")
    if not torch.cuda.is_available():
        training.setdefault("mixed_precision_param", "float32")
    return job


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(recipe: Recipe, overrides: Overrides = None, allow_fallback: AllowFallback = False) -> None:
    """Trains RECIPE on this process of a torchrun job."""
    try:
        train(recipe, overrides or [], allow_fallback)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    app()
