"""Mistakes in a job are named before training starts."""

from pathlib import Path

import pytest

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import recipes
from flashmoe_train.integrations.torchtitan.converters import job

from .jobs import tables_of

TENSOR = "parallelism.tensor_parallel_degree=2"
WIDTH = "model.moe.moe_intermediate_size=97"


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
        ("model.converters=['foo']", r"\[model\] converters = 'foo' does not exist; possible: flashmoe, quantize"),
        (
            "experimental.custom_import=nowhere.x",
            r"\[experimental\] custom_import = 'nowhere.x' cannot be imported, .*: No module named 'nowhere'",
        ),
        ("experimental.custom_import=torchtitan.x", r"custom_import = 'torchtitan.x' .* installed: no such module"),
        ("optimizer.beta1=1.0", r"\[optimizer\] beta1 must be a float, at least 0.0 and less than 1, found 1.0"),
        ("optimizer.beta2=-0.1", r"\[optimizer\] beta2 must be a float, at least 0.0 and less than 1, found -0.1"),
        ("optimizer.beta1=0", r"\[optimizer\] beta1 must be a float, .* found 0$"),
        ("optimizer.lr=-1.0", r"\[optimizer\] lr must be at least 0, found -1.0"),
        ("optimizer.eps=nan", r"\[optimizer\] eps must be at least 0, found nan"),
        ("optimizer.weight_decay=-1", r"\[optimizer\] weight_decay must be at least 0, found -1"),
        ("training.gc_freq=0", r"\[training\] gc_freq must be at least 1, found 0"),
        ("compile.components=['modle']", r"\[compile\] components = 'modle' does not exist; did you mean 'model'\?"),
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
            ["parallelism.pipeline_parallel_degree=2", "parallelism.pipeline_parallel_microbatch_size=3"],
            2,
            r"pipeline_parallel_microbatch_size 3 does not divide \[training\] local_batch_size \(4\)",
        ),
        (
            ["parallelism.pipeline_parallel_microbatch_size=0"],
            1,
            r"pipeline_parallel_microbatch_size must be at least 1, found 0",
        ),
        (["training.seq_len=33"], 1, r"seq_len = 33 must be a multiple of 2, which is 2 × .*tensor_parallel_degree 1"),
        (["training.seq_len=66", "parallelism.tensor_parallel_degree=2"], 2, "seq_len = 66 must be a multiple of 4"),
        (["training.seq_len=66", "parallelism.context_parallel_degree=2"], 2, "seq_len = 66 .* of 4, .*degree 2$"),
        (
            ["validation.enable=true", "validation.dataset=torch_sources", "validation.seq_len=33", TENSOR],
            2,
            r"\[validation\] seq_len = 33 must be a multiple of 2, because .*tensor_parallel_degree 2",
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


VALIDATES = ("validation.enable=true", "validation.dataset=torch_sources", "validation.seq_len=64")


@pytest.mark.parametrize(
    "overrides, text",
    [
        ((*VALIDATES, "validation.seq_len=0"), r"\[validation\] seq_len must be at least 1, found 0"),
        (
            (*VALIDATES, "validation.local_batch_size=-1"),
            r"\[validation\] local_batch_size must be at least 1, found -1",
        ),
        (
            ("profiling.enable_profiling=true", "profiling.profile_freq=0"),
            r"profile_freq must be at least 4, which is profiler_warmup \(3\) and profiler_active \(1\), found 0",
        ),
        (
            ("profiling.enable_profiling=true", "profiling.profiler_active=0"),
            "profiler_active must be at least 1, found 0",
        ),
        (("profiling.enable_profiling=true", "profiling.profiler_warmup=-1"), "warmup must be at least 0, found -1"),
        (
            ("profiling.enable_memory_snapshot=true", "profiling.profile_freq=0"),
            "profile_freq must be at least 1, found 0",
        ),
    ],
)
def test_numbers_of_what_is_switched_on(overrides: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config(*overrides)
    config(overrides[-1])  # switched off it is no matter


def test_names_and_numbers_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(*VALIDATES, "validation.steps=-1")
    config(
        "profiling.enable_profiling=true", "profiling.profile_freq=4", "optimizer.beta1=0.0", "compile.components=[]"
    )
    config(
        "profiling.enable_memory_snapshot=true", "profiling.profile_freq=1", "model.converters=['quantize.linear.mx']"
    )
    (tmp_path / "beside.py").write_text("raise SystemExit('it is not run to look for it')")
    monkeypatch.chdir(tmp_path)  # where torchrun's processes look too
    config("experimental.custom_import=beside", "model.converters=['brought_by_it']")


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


def test_experts_are_shared_beside_fsdp_alone() -> None:
    """TorchTitan asks deepseek_v3 for FSDP's mesh; qwen3 it does not."""
    shared = ("parallelism.expert_parallel_degree=2", TENSOR)
    with pytest.raises(UsageError, match=r"0\.2's deepseek_v3 shares experts only beside FSDP .* none of 2 processes"):
        config("model.name=deepseek_v3", *shared, processes=2)
    config("model.name=deepseek_v3", *shared, processes=4)
    config("model.name=qwen3", "model.flavor=debugmodel_moe", *shared, processes=2)
    text = "expert_tensor_parallel_degree 3 must be 1 or tensor_parallel_degree, which is 2"
    with pytest.raises(UsageError, match=text):
        config("model.name=deepseek_v3", *shared, "parallelism.expert_tensor_parallel_degree=3", processes=4)


@pytest.mark.parametrize(
    "overrides, processes, text",
    [
        (("parallel.tensor=2", "model.intermediate_size=97"), 2, r"the width of layers.0.feed_forward \(97\)"),
        (
            ("parallel.tensor=2", "parallel.expert=1", WIDTH, "model.moe.n_shared_experts=1"),
            2,
            r"tensor_parallel_degree 2 does not divide the width of layers.1.moe.shared_experts \(97\)",
        ),
        (
            ("parallel.expert=2", "model.moe.num_experts=2", "model.moe.num_experts_per_tok=1", WIDTH),
            4,
            r"4 processes share 2 experts, and FSDP over 2 of them does not divide an expert's hidden dim \(97\)",
        ),
        (("model.mla.kv_lora_rank=33",), 1, r"\[model.mla\] kv_lora_rank = 33 must be even"),
    ],
)
def test_widths_must_fit(overrides: tuple[str, ...], processes: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        recipes.resolve(recipe.load("quickstart", overrides), processes)


def test_widths_that_dtensor_cuts_unevenly() -> None:
    """Experts' hidden dim, the model's own and the vocabulary are no matter."""
    odd = ("model.moe.moe_intermediate_size=97", "model.hidden_size=257", "model.vocab_size=513")
    recipes.resolve(recipe.load("qwen3_moe_debug", [*odd, "parallel.tensor=2", "parallel.expert=1"]), 2)


@pytest.mark.parametrize(
    "overrides, processes, text",
    [
        (("schedule=bogus",), 2, r"pipeline_parallel_schedule = 'bogus': .*'1F1B'"),
        (("schedule=PipelineScheduleSingle",), 2, "schedule = 'PipelineScheduleSingle' is no schedule"),
        (("layers_per_stage=0",), 2, "layers_per_stage must be at least 1, found 0"),
        (
            ("layers_per_stage=1",),
            2,
            "1: 6 layers, and 2 that the ends count as, make 8 stages; 1F1B needs one on each",
        ),
        (
            ("layers_per_stage=4", "schedule=Interleaved1F1B"),
            2,
            "make 2 stages; Interleaved1F1B needs the same number, two or more, on each of 2 processes",
        ),
        (
            ("first_stage_less_layers=8",),
            2,
            r"cuts the model's 6 layers into 2 stages, .*input_weight \(8\) exceeds minimum layers per stage",
        ),
    ],
)
def test_pipelines_must_fit(overrides: tuple[str, ...], processes: int, text: str) -> None:
    said = [f"parallelism.pipeline_parallel_{override}" for override in overrides]
    with pytest.raises(UsageError, match=text):
        config("parallelism.pipeline_parallel_degree=2", *said, processes=processes)


def test_pipelines_that_fit() -> None:
    degree = "parallelism.pipeline_parallel_degree"
    config(f"{degree}=2", "parallelism.pipeline_parallel_schedule=Interleaved1F1B", processes=2)
    config(f"{degree}=2", "parallelism.pipeline_parallel_layers_per_stage=4", processes=2)
    config(f"{degree}=4", "training.local_batch_size=8", processes=4)
    with pytest.raises(UsageError, match="cuts the model's 6 layers into 16 stages"):
        schedule = "parallelism.pipeline_parallel_schedule=Interleaved1F1B"
        config(f"{degree}=8", "training.local_batch_size=8", schedule, processes=8)
