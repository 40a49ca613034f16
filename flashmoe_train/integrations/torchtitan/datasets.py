"""A recipe's data sets among TorchTitan's, and the quickstart's corpus for native job files."""

from collections.abc import Callable
from typing import Any

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from flashmoe_train import data
from flashmoe_train.errors import UsageError


def register(name: str, source: str | dict[str, Any], text_column: str, replicas: int) -> str:
    """Adds what a recipe's `[data]` calls `source` to TorchTitan's data sets, to be shared by that many data-parallel
    processes; returns its name there."""
    if isinstance(source, str) and source in data.TORCH_SOURCES:
        return source

    def load(path: str) -> Any:
        rows, first = data.open_source(source, replicas)
        if len(first) < replicas:  # TorchTitan would search for ever for a process' next row
            raise UsageError(f"{source}: fewer rows than the {replicas} processes that share them")
        if text_column not in first[0]:
            raise UsageError(f"{source} has no column {text_column!r}; [data] text_column may be: {list(first[0])}")
        text_of(first[0])  # before the model is built
        return rows

    text_of = _column(text_column, source)
    DATASETS[name] = DatasetConfig(str(source), load, text_of)
    return name


def _column(name: str, source: str | dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    return lambda row: data.text_of(row, name, source)


def _corpus(held_out: bool) -> Callable[[str], Any]:
    return lambda path: data.corpus(held_out)


for _name, _held_out in data.TORCH_SOURCES.items():
    # `path` is where TorchTitan would load from; this corpus is wherever torch is installed.
    DATASETS[_name] = DatasetConfig("torch", _corpus(_held_out), _column("text", _name))
