"""Mistakes in a job are named before training starts."""

from pathlib import Path

import pytest

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan.converters import job

from .jobs import tables_of


def config(*overrides: str, processes: int = 1):
    tables = tables_of("llama3", "debugmodel", Path("unused"))
    swap = tables.pop("flashmoe")
    tables["model"]["hf_assets_path"] = "bytes"
    for override in overrides:
        recipe.apply(tables, override)
    job.check_tables(tables)
    parsed = job.parse(tables | {"flashmoe": swap})
    job.check(parsed, processes)
    return parsed


def test_accepts_a_job() -> None:
    parsed = config("optimizer.lr=1")
    assert (parsed.training.steps, parsed.optimizer.lr, parsed.flashmoe.attention) == (8, 1, "flashmoe")
    config("parallelism.tensor_parallel_degree=2", processes=4)
    config("parallelism.data_parallel_shard_degree=4", processes=4)
    config("model.name=deepseek_v3", "parallelism.expert_parallel_degree=2", processes=2)


def test_refuses_a_pipeline_that_torchtitan_lacks() -> None:
    with pytest.raises(UsageError, match=r"pipeline_parallel_degree: TorchTitan cannot pipeline qwen3"):
        config("model.name=qwen3", "parallelism.pipeline_parallel_degree=2", processes=2)


@pytest.mark.parametrize(
    "override, text",
    [
        ("training.stepz=3", r"unknown key \[training\] stepz; did you mean 'steps'\?"),
        ("trainin.steps=3", r"unknown table \[trainin\]; did you mean 'training'\?"),
        ("training.dataloader=3", r"\[training.dataloader\] must be a table, found 3"),
        ("training=3", r"\[training\] must be a table, found 3"),
        ("training.steps=ten", r"\[training\] steps = 'ten': .*valid integer"),
        ("compile.enable=False", r"\[compile\] enable = 'False': .*valid boolean"),
        ("training.steps='10'", r"\[training\] steps = '10': .*valid integer"),
        ("parallelism.tensor_parallel_degree=0", r"tensor_parallel_degree must be at least 1, found 0"),
        ("parallelism.data_parallel_shard_degree=0", r"must be at least 1, or -1 for all that is left, found 0"),
        ("parallelism.expert_parallel_degree=2", r"expert_parallel_degree 2: debugmodel has no experts"),
        ("checkpoint.create_seed_checkpoint=true", r"create_seed_checkpoint needs enable = true and one process"),
        ("metrics.enable_wandb=true", r"enable_wandb: Weights & Biases is not installed: pip install wandb"),
        ("model.name=llama33", r"\[model\] name = 'llama33' is not a model; did you mean 'llama3'\?"),
        ("training.steps=0", r"\[training\] steps must be at least 1, found 0"),
        ("metrics.log_freq=0", r"\[metrics\] log_freq must be at least 1, found 0"),
        ("training.global_batch_size=7", r"global_batch_size = 7 must be a multiple of 4, which is local_batch_size"),
        ("optimizer.name=foo", r"\[optimizer\] name = 'foo' does not exist; possible: Adam, AdamW"),
        ("model.hf_assets_path=nowhere", r"\[model\] hf_assets_path = 'nowhere': no such folder"),
        ("model.hf_assets_path=/", r"\[model\] hf_assets_path = '/': a folder without tokenizer.json"),
        ("model.name=flux", r"\[model\] (name = 'flux' is not a|flavor = 'debugmodel' does not exist)"),
        ("model.flavor=debug", r"\[model\] flavor = 'debug' does not exist; did you mean 'debugmodel'\?"),
        ("training.dataset=foo", r"\[training\] dataset = 'foo' does not exist; possible: .*torch_sources"),
        ("parallelism.tensor_parallel_degree=2", r"tensor_parallel_degree 2: needs a multiple of 2 processes, found 1"),
        ("parallelism.data_parallel_shard_degree=2", r"data_parallel_shard_degree 2: needs 2 processes, found 1"),
    ],
)
def test_names_the_mistake(override: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config(override)


@pytest.mark.parametrize(
    "overrides, processes, text",
    [
        (["parallelism.tensor_parallel_degree=3"], 3, "tensor_parallel_degree 3 does not divide the model's 16 heads"),
        (
            ["parallelism.pipeline_parallel_degree=2", "parallelism.pipeline_parallel_microbatch_size=4"],
            2,
            "pipeline_parallel_degree 2: a process' batch of 4 makes 1 pieces of 4, and every stage needs one",
        ),
        (
            ["checkpoint.enable=true", "checkpoint.initial_load_path=nowhere"],
            1,
            r"\[checkpoint\] initial_load_path = 'nowhere': no such folder",
        ),
    ],
)
def test_numbers_and_paths_must_fit(overrides: list[str], processes: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config(*overrides, processes=processes)


def test_names_the_table_as_the_file_does() -> None:
    with pytest.raises(UsageError, match=r"unknown key \[torchtitan.training\] stepz"):
        job.check_tables({"training": {"stepz": 3}}, "torchtitan")
    with pytest.raises(UsageError, match=r"\[torchtitan.training\] steps = 'x'"):
        job.check_tables({"training": {"steps": "x"}}, "torchtitan")


def test_names_several_wrong_types_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)\[optimizer\] lr.*\[training\] steps"):
        config("training.steps=ten", "optimizer.lr=[1]")


@pytest.mark.parametrize(
    "degree, processes, text",
    [
        (3, 3, "expert_parallel_degree 3 does not divide the 8 experts"),
        (4, 2, r"expert_parallel_degree 4 × expert_tensor_parallel_degree 1 must divide the 2 processes"),
    ],
)
def test_expert_parallelism_must_fit(degree: int, processes: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config("model.name=deepseek_v3", f"parallelism.expert_parallel_degree={degree}", processes=processes)
