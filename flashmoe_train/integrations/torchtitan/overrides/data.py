"""TorchTitan 0.3.x's text, with attention over whole sequences where a recipe does not ask for document masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader


class WholeSequences(HuggingFaceTextDataLoader):
    """Positions count through a sequence, whatever documents are in it. TorchTitan's begin again with every document,
    and from them follow both the rotary embedding and who sees whom."""

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        pass

    def __iter__(self) -> Iterator[Any]:
        for inputs, labels in super().__iter__():
            tokens = inputs["input"]
            inputs["positions"] = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
            yield inputs, labels
