"""Mistakes in a job file are named before training starts."""

from pathlib import Path

import pytest

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import job

from .jobs import tables_of


def config(*overrides: str, processes: int = 1):
    tables = tables_of("llama3", "debugmodel", Path("unused"))
    for override in overrides:
        recipe.apply(tables, override)
    parsed = job.parse(tables)
    job.check(parsed, processes)
    return parsed


def test_accepts_a_job() -> None:
    parsed = config("optimizer.lr=1")
    assert (parsed.training.steps, parsed.optimizer.lr, parsed.flashmoe.attention) == (8, 1, "flashmoe")
    config("parallelism.tensor_parallel_degree=2", processes=4)
    config("parallelism.data_parallel_shard_degree=4", processes=4)


@pytest.mark.parametrize(
    "override, text",
    [
        ("training.stepz=3", r"unknown key \[training\] stepz; did you mean 'steps'\?"),
        ("trainin.steps=3", r"unknown table \[trainin\]; did you mean 'training'\?"),
        ("flashmoe.attn='stock'", r"unknown key \[flashmoe\] attn; did you mean 'attention'"),
        ("training.dataloader=3", r"\[training\] dataloader must be a table, found 3"),
        ("training.steps=ten", r"\[training\] steps = 'ten': .*valid integer"),
        ("flashmoe.attention=fast", r"\[flashmoe\] attention = 'fast': .*'flashmoe' or 'stock'"),
        ("compile.enable=maybe", r"\[compile\] enable = 'maybe'"),
        ("model.name=llama33", r"\[model\] name = 'llama33' is not a model; did you mean 'llama3'\?"),
        ("model.flavor=debug", r"\[model\] flavor = 'debug' does not exist; did you mean 'debugmodel'\?"),
        ("training.dataset=foo", r"\[training\] dataset = 'foo' does not exist; possible: .*torch_sources"),
        ("parallelism.tensor_parallel_degree=2", r"tensor_parallel_degree 2: needs a multiple of 2 processes, found 1"),
        ("parallelism.data_parallel_shard_degree=2", r"data_parallel_shard_degree 2: needs 2 processes, found 1"),
    ],
)
def test_names_the_mistake(override: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config(override)


def test_names_several_wrong_types_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)\[optimizer\] lr.*\[training\] steps"):
        config("training.steps=ten", "optimizer.lr=[1]")
