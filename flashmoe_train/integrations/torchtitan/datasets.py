"""The quickstart's corpus among TorchTitan's data sets."""

from typing import Any

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from flashmoe_train import data


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


# `path` is where TorchTitan would load from; this corpus is wherever torch is installed.
DATASETS["torch_sources"] = DatasetConfig("torch", lambda path: data.corpus(), _text)
DATASETS["torch_sources_heldout"] = DatasetConfig("torch", lambda path: data.corpus(held_out=True), _text)
