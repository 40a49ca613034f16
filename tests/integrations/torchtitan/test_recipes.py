"""What TorchTitan is told by a recipe, and what a recipe cannot say."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import recipes
from flashmoe_train.integrations.torchtitan.converters import job
from flashmoe_train.integrations.torchtitan.datasets import DATASETS
from flashmoe_train.integrations.torchtitan.explain import explain


def job_of(*overrides: str, processes: int = 1, name: str = "quickstart") -> recipes.Job:
    return recipes.job_of(recipe.load(name, overrides), processes)


def test_shared_keys_reach_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    found = job_of(
        "training.precision=bfloat16",
        "training.compile=true",
        "training.deterministic=true",
        "training.activation_checkpointing=selective",
        "parallel.tensor=2",
        "parallel.replicate=2",
        "swap.attention=stock",
        "torchtitan.optimizer.eps=1e-6",
        "torchtitan.metrics.enable_wandb=true",
        "torchtitan.profiling.enable_profiling=true",
        processes=8,
    )
    expected = {
        "job.dump_folder": "outputs/quickstart",
        "model.name": "deepseek_v3",
        "model.hf_assets_path": "bytes",
        "model.converters": ["flashmoe"],
        "flashmoe.attention": "stock",
        "flashmoe.moe": "flashmoe",
        "training.dataset": "torch_sources",
        "training.steps": 80,
        "training.seq_len": 128,
        "training.mixed_precision_param": "bfloat16",
        "optimizer.lr": 1e-3,
        "optimizer.eps": 1e-6,
        "lr_scheduler.warmup_steps": 8,
        "debug.seed": 0,
        "debug.deterministic": True,
        "compile.enable": True,
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
        "validation.enable": True,
        "validation.dataset": "torch_sources_heldout",
        "validation.freq": 40,
        "validation.steps": 8,
        "validation.seq_len": 128,
        "parallelism.tensor_parallel_degree": 2,
        "parallelism.data_parallel_replicate_degree": 2,
        "parallelism.expert_parallel_degree": 4,
        "metrics.enable_wandb": True,
        "metrics.enable_tensorboard": True,
        "profiling.enable_profiling": True,
    }
    assert {place: found.get(place) for place in expected} == expected
    config = job.parse(found.tables)
    job.check(config, 8)
    assert (config.optimizer.eps, config.flashmoe.attention, config.profiling.enable_profiling) == (1e-6, "stock", True)


def test_what_a_recipe_does_not_say_is_torchtitans_default(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text('framework = "torchtitan"\nconfig = "llama3_debug"')
    found = job_of(name=str(path))
    assert set(found.tables) == {"job", "flashmoe", "model", "metrics", "training"}
    assert set(found.tables["training"]) == {"dataset", "mixed_precision_param"}
    assert found.said_by["training.dataset"] == found.said_by["training.mixed_precision_param"] == "flashmoe train"


@pytest.mark.parametrize(
    "override, text",
    [
        ("torchtitan.training.steps=5", r"\[torchtitan.training\] steps = 5 contradicts \[training\] steps, .* to 80"),
        (
            "torchtitan.model.name=llama3",
            r"\[torchtitan.model\] name = 'llama3' contradicts \[model\], .*'deepseek_v3'",
        ),
        ("torchtitan.job.dump_folder=x", r"\[torchtitan.job\] dump_folder = 'x' contradicts folder"),
        ("torchtitan.training.stepz=5", r"unknown key \[torchtitan.training\] stepz; did you mean 'steps'"),
        ("torchtitan.flashmoe.moe=stock", r"unknown table \[torchtitan.flashmoe\]"),
        ("torchtitan.training.max_norm=x", r"\[torchtitan.training\] max_norm = 'x': .*; or "),
        ("torchtitan.training=3", r"\[torchtitan.training\] must be a table, found 3"),
    ],
)
def test_contradictions_and_mistakes_are_named(override: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        job_of(override)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["parallel.tensor=3"], r"\[parallelism\] tensor_parallel_degree 3: .* \(said by \[parallel\] tensor\)"),
        (
            ["parallel.replicate=2", "parallel.pipeline=2", "training.global_batch_size=10"],
            r"needs a multiple of 4 processes, found 2 \(said by \[parallel\] pipeline, \[parallel\] replicate\)",
        ),
        (["torchtitan.metrics.log_freq=0"], r"\[metrics\] log_freq must be at least 1, found 0$"),
    ],
)
def test_mistakes_are_told_in_the_recipes_words(overrides: list[str], text: str) -> None:
    loaded = recipe.load("quickstart", overrides)
    with pytest.raises(UsageError, match=text):
        recipes.resolve(loaded, 2)


@pytest.mark.parametrize(
    "recipe_text, text",
    [
        ("", "names no model: neither a config, nor"),
        ("[torchtitan.model]\nname = 'llama3'\n[data]\ndocument_masks = true", "document_masks needs"),
        (
            "config = 'llama3_debug'\n[torchtitan.metrics]\nenable_tensorboard = false",
            "enable_tensorboard = False contradicts",
        ),
    ],
)
def test_keys_without_effect_are_refused(recipe_text: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'framework = "torchtitan"\n{recipe_text}')
    with pytest.raises(UsageError, match=text):
        job_of(name=str(path))


@pytest.mark.parametrize(
    "name, processes, overrides, swapped",
    [
        ("deepseek_v3_16b_4gpu", 4, (), 27 + 2 * 26 + 1),
        ("deepseek_v3_16b_4gpu", 2, ("model.num_hidden_layers=13", "swap.dispatch=flashmoe"), 13 + 3 * 12 + 1),
        ("two_nodes/deepseek_v3_16b_16gpu", 16, (), 27 + 2 * 26 + 1),
        ("qwen3_30b_24layers_4gpu", 4, ("swap.dispatch=flashmoe",), 24 + 3 * 24),
        ("qwen3_30b_24layers_4gpu", 2, ("model.num_hidden_layers=12",), 12 + 2 * 12),
        ("llama3_8b_4gpu", 4, (), 32),
        ("llama3_8b_4gpu", 2, (), 32),
        ("llama3_8b_32k_4gpu", 4, (), 32),
        ("llama3_8b_32k_4gpu", 2, ("parallel.context=2",), 32),
    ],
)
def test_large_recipes_fit_their_processes(
    name: str, processes: int, overrides: tuple[str, ...], swapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda package: "2.11.0" if package == "torch" else version(package)
    )
    found = explain(recipe.load(name, overrides), processes)
    assert sum(row[3] for row in found.swaps.summary()) == swapped
    kind = "context" if "32k" in name else "FSDP" if "llama" in name else "experts over"
    assert f"{kind} {min(processes, 8)}" in found.processes


def test_the_same_value_twice_is_no_contradiction() -> None:
    assert job_of("torchtitan.training.steps=80").get("training.steps") == 80


@pytest.mark.parametrize("processes, degree", [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_auto_spreads_the_experts_as_far_as_they_go(processes: int, degree: int) -> None:
    assert job_of(processes=processes).get("parallelism.expert_parallel_degree") == degree


def test_auto_needs_experts() -> None:
    with pytest.raises(UsageError, match=r"\[parallel\] expert: this model has no experts"):
        job_of("parallel.expert=auto", name="llama3_debug")


@pytest.mark.parametrize(
    "batch, most, processes, parallel, local, pieces",
    [
        (8, 4, 1, {}, 4, None),
        (8, 4, 2, {}, 4, None),
        (8, 4, 8, {}, 1, None),
        (12, 4, 2, {}, 3, None),  # of a share of 6 no more than 4: turns of 3
        (8, 4, 4, {"tensor": 2}, 4, None),
        (8, 2, 2, {"pipeline": 2}, 8, 2),
        (8, 8, 2, {"pipeline": 2}, 8, 4),  # every stage needs a piece
    ],
)
def test_the_batch_is_the_recipes_whatever_the_processes(
    batch: int, most: int, processes: int, parallel: dict[str, int], local: int, pieces: int | None
) -> None:
    degrees = [f"parallel.{key}={value}" for key, value in parallel.items()]
    found = job_of(
        f"training.global_batch_size={batch}", f"training.micro_batch_size={most}", *degrees, processes=processes
    )
    assert found.get("training.global_batch_size") == batch
    assert found.get("training.local_batch_size") == local
    assert found.get("parallelism.pipeline_parallel_microbatch_size") == pieces


def test_without_a_global_batch_the_micro_batch_is_a_piece(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('framework = "torchtitan"\nconfig = "llama3_debug"\n[training]\nmicro_batch_size = 3')
    assert job_of(name=str(path)).get("training.local_batch_size") == 3
    found = job_of("parallel.pipeline=2", name=str(path), processes=2)
    assert found.get("training.local_batch_size") == 6
    assert found.get("parallelism.pipeline_parallel_microbatch_size") == 3


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"global_batch_size = 8 cannot be shared by 3 .*make it a multiple of 3"):
        job_of(processes=3)


def test_data_from_files_and_load_dataset(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"content": f"text {i}"}) + "\n" for i in range(3)))
    table = f'{{path="json", data_files="{path}", split="train[:2]"}}'
    found = job_of(f"data.train={path}", f"data.heldout={table}", "data.text_column=content", processes=2)
    for place, rows in (("training.dataset", 3), ("validation.dataset", 2)):
        dataset = DATASETS[found.get(place)]
        loaded = dataset.loader(dataset.path)
        assert [dataset.sample_processor(row) for row in loaded] == [f"text {i}" for i in range(rows)]


@pytest.mark.parametrize(
    "overrides, processes, text",
    [
        (["data.train={path}"], 1, r"texts.jsonl has no column 'text'; .*\['content'\]"),
        (["data.train={path}", "data.text_column=content"], 3, "fewer rows than the 3 processes"),
        (['data.train={{path="json", data_files="{path}", splits="train"}}'], 1, "load_dataset.*failed: .*splits"),
    ],
)
def test_data_that_cannot_be_read_is_named(overrides: list[str], processes: int, text: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"content": "text"}) + "\n")
    overrides = [override.format(path=path) for override in overrides]
    found = job_of("training.global_batch_size=12", *overrides, processes=processes)
    dataset = DATASETS[found.get("training.dataset")]
    with pytest.raises(UsageError, match=text):
        dataset.loader(dataset.path)


@pytest.mark.parametrize("rows, found", [([None], "null"), ([1], "int"), ([["a"]], "list"), (["a", 1], "int")])
def test_text_that_is_none_is_named(rows: list[Any], found: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in rows))
    dataset = DATASETS[job_of(f"data.train={path}").get("training.dataset")]
    with pytest.raises(UsageError, match=rf"texts.jsonl: \[data\] text_column 'text' must hold strings, found {found}"):
        for row in dataset.loader(dataset.path):  # whose first row is looked at before any is asked for
            assert dataset.sample_processor(row) == "a"


@pytest.mark.parametrize(
    "override, text",
    [
        ("data.train=missing.jsonl", r"\[data\] train = 'missing.jsonl': no such file"),
        (
            "data.train=torch_source",
            r"\[data\] train = 'torch_source' is neither .*did you mean 'torch_sources'",
        ),
        ("data.heldout=texts.doc", r"\[data\] heldout = 'texts.doc' is neither a file .*nor one of torch_sources"),
        ("data.tokenizer=nowhere", r"\[data\] tokenizer = 'nowhere': no such folder"),
    ],
)
def test_missing_data_is_named_before_anything_starts(override: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        job_of(override)


def test_an_unmodified_job_file_is_swapped_and_completed(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('[job]\n[model]\nname = "llama3"\nflavor = "debugmodel"\n[training]\ndataset = "c4"')
    found = job_of(name=str(path))
    assert found.get("model.converters") == ["flashmoe"] and found.get("training.dataset") == "c4"
    assert found.get("model.hf_assets_path") == "bytes" and found.get("job.dump_folder") == "outputs/job"
    job.check(job.parse(found.tables), 1)
    with pytest.raises(UsageError, match=r"^unknown key \[training\] stepz"):
        job_of("training.stepz=3", name=str(path))


def test_seed_and_the_runs_that_start_from_it(tmp_path: Path) -> None:
    loaded = recipe.load(
        "quickstart", ["parallel.tensor=2", "training.compile=true", "torchtitan.checkpoint.interval=3"]
    )
    first, weights = recipes.seed(loaded, str(tmp_path))
    seed = recipes.job_of(first, 1)
    assert (seed.get("flashmoe.attention"), seed.get("flashmoe.moe")) == ("stock", "stock")
    assert seed.get("checkpoint.create_seed_checkpoint") and seed.get("job.dump_folder") == str(tmp_path)
    job.check(job.parse(seed.tables), 1)
    assert weights == f"{tmp_path}/checkpoint/step-0"
    Path(weights).mkdir(parents=True)
    (Path(weights) / ".metadata").touch()
    start = recipes.job_of(recipes.starting_from(loaded, weights), 2)
    assert start.get("checkpoint.initial_load_path") == weights
    assert start.get("checkpoint.load_only") and start.get("parallelism.tensor_parallel_degree") == 2
    assert loaded.torchtitan["checkpoint"] == {"interval": 3}
