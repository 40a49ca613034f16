"""Attention's kernel in TorchTitan's models, in bfloat16: losses are as near to stock's as those of stock with one of
PyTorch's kernels are to those with another."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from ... import processes
from ...ops.operators import ON_HOPPER, CountOperators
from . import runs

LAYERS, STEPS = 4, 20
OVERRIDES = (
    "training.precision=bfloat16",
    f"training.steps={STEPS}",
    "training.seq_len=1024",
    "training.global_batch_size=4",
    f"model.num_hidden_layers={LAYERS}",
    "swap.moe=stock",  # the same experts in every run: only attention differs
)
STOCK = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@contextlib.contextmanager
def stock_runs(backend: SDPBackend) -> Iterator[None]:
    """TorchTitan's attention has a list of backends to choose from, and makes its own where it finds that empty."""
    from torchtitan.models.attention import ScaledDotProductAttentionWrapper

    with mock.patch.object(ScaledDotProductAttentionWrapper, "sdpa_backends", [backend]):
        yield


def train_with_each(rank: int, port: int, name: str, root: Path, overrides: tuple[str, ...]) -> None:
    """Trains a recipe from the same weights with each of PyTorch's kernels that takes its heads, and with ours. Writes
    losses.json, by kernel, and calls.json: how often our operators ran."""
    # TorchTitan's barrier names the GPU, which gloo does not take.
    processes.join(rank, 1, port, "nccl" if torch.cuda.is_available() else "gloo")
    losses: dict[str, list[float]] = {}

    def train(attention: str, choice: str) -> None:
        folder = root / attention
        losses[attention] = [
            *runs.train(folder, *OVERRIDES, *overrides, f"swap.attention={choice}", name=name).values()
        ]

    for backend in STOCK:
        try:
            with stock_runs(backend):
                train(backend.name, "stock")
        except RuntimeError as error:
            if not re.search("No (available kernel|viable backend)", str(error)):
                raise
    with CountOperators() as counter:
        train("flashmoe", "flashmoe")
    (root / "losses.json").write_text(json.dumps(losses))
    (root / "calls.json").write_text(json.dumps(counter.counts))
    dist.destroy_process_group()


def distance(a: list[float], b: list[float]) -> float:
    """Mean over the steps of how much two runs differ."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize(
    "name, overrides",
    [
        *(pytest.param(f"{family}_debug", (), marks=ON_HOPPER) for family in ("llama3", "qwen3_moe", "deepseek_v3")),
        # Runs on a CPU too, where PyTorch has two kernels and ours is the reference.
        pytest.param("llama3_debug", ("training.seq_len=64",), marks=[pytest.mark.slow, ON_HOPPER[1]], id="short"),
    ],
)
def test_losses_are_within_the_noise_of_stock(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    processes.start(train_with_each, processes.free_port(), name, tmp_path, overrides, processes=1)
    stock = json.loads((tmp_path / "losses.json").read_text())
    calls = json.loads((tmp_path / "calls.json").read_text())
    print(f"\n{name}: losses of {STEPS} steps")
    for attention, losses in stock.items():
        print(f"{attention:20}", *(f"{loss:.4f}" for loss in losses))
    ours = stock.pop("flashmoe")
    assert len(stock) >= 2, f"only {list(stock)} of PyTorch's kernels took the heads: nothing to measure noise with"
    noise = {f"{a} {b}": distance(stock[a], stock[b]) for a, b in itertools.combinations(stock, 2)}
    found = {attention: distance(ours, losses) for attention, losses in stock.items()}
    for what, value in (noise | {f"flashmoe {attention}": value for attention, value in found.items()}).items():
        print(f"{what:40} mean difference {value:.1e}")
    assert calls == {"attention_forward": LAYERS * STEPS, "attention_backward": LAYERS * STEPS}
    for attention, losses in stock.items():
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5, f"{attention} does not learn: {losses}"
    assert min(noise.values()) > 0, "two of PyTorch's kernels gave the same losses: it was one kernel"
    assert min(found.values()) <= 2 * max(noise.values())
