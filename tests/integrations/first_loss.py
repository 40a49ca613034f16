"""One model in several frameworks: from the same weights, on the same tokens, the same first loss.

The weights are random numbers that follow from their names in Hugging Face's format, which all frameworks read; the
batch is the beginning of one long document, since they pack several in different ways. Each framework is tested in an
environment of its own, against the numbers below, which are TorchTitan's in float32.
"""

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

FIRST_LOSSES = {"llama3_debug": 7.045706, "qwen3_moe_debug": 6.683467, "deepseek_v3_debug": 6.897887}
# Without the bias by which experts are chosen, which not every framework has beside softmax scores.
UNBIASED = {"deepseek_v3_debug": 6.895734}
BIAS = "e_score_correction_bias"

SMALL = ("training.seq_len=64", "training.global_batch_size=1", "training.micro_batch_size=1", "training.steps=1")


def write_text(root: Path) -> None:
    text = "".join(chr(32 + (i * i * i + 7 * i) % 90) for i in range(400))
    (root / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")


def write_weights(root: Path, shapes: dict[str, torch.Size]) -> Path:
    """Weights of these names and shapes; returns their folder."""
    (root / "weights").mkdir()
    save_file({name: weight(name, shape) for name, shape in shapes.items()}, root / "weights/model.safetensors")
    return root / "weights"


def weight(name: str, shape: torch.Size) -> torch.Tensor:
    """Large enough that the outputs depend on every part of the model."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.1 * numbers if len(shape) == 1 else 0.06 * numbers


def assert_first(name: str, losses: list[float], wanted: dict[str, float]) -> None:
    bound = 1e-5 if name == "llama3_debug" else 1e-4
    assert losses == pytest.approx([wanted[name]], abs=bound), f"{name}: {losses}, expected {wanted[name]}"
