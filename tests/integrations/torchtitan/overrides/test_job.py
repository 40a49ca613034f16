"""What TorchTitan 0.3.x is told by a recipe that 0.2.x reads too, and what it cannot be told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import recipes
from flashmoe_train.integrations.torchtitan.explain import explain
from flashmoe_train.integrations.torchtitan.overrides import job
from flashmoe_train.integrations.torchtitan.overrides.data import WholeSequences

SHIPPED = ["quickstart", "llama3_debug", "qwen3_moe_debug", "deepseek_v3_debug"]


def config_of(*changes: str, processes: int = 1, name: str = "quickstart") -> Any:
    return recipes.resolve(recipe.load(name, changes), processes)[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_come_to_the_same_models(name: str) -> None:
    found = explain(recipe.load(name), 2)
    sizes = {"llama3_debug": "3.4 million", "qwen3_moe_debug": "11.3 million parameters, 4.2 million at work"}
    assert sizes.get(name, "13.9 million parameters, 9.0 million at work") in found.model
    swapped = {row[2] for row in found.swaps.summary()}
    moe = {"FlashMoERoutedExperts", "FlashMoEExperts"} if name != "llama3_debug" else set()
    assert swapped == {"FlashMoEAttention"} | moe
    settings = {setting.key: setting[1:] for setting in found.settings}
    assert settings["optimizer.param_groups[0].lr"] == (1e-3, "[training] learning_rate")
    assert settings["validator.freq"][1] == "[training] validate_every"


@pytest.mark.parametrize("name, processes", [("deepseek_v3_16b_4gpu", 4), ("two_nodes/deepseek_v3_16b_16gpu", 16)])
def test_large_recipes_are_the_same_models(name: str, processes: int) -> None:
    found = explain(recipe.load(name), processes)
    assert found.model == "deepseek_v3: 15,706.5 million parameters, 2,661.2 million at work for a token"
    assert sum(row[3] for row in found.swaps.summary()) == 27 + 2 * 26


def test_keys_that_moved_and_keys_that_became_something_else() -> None:
    config = config_of(
        "training.activation_checkpointing=full",
        "training.deterministic=true",
        "torchtitan.optimizer.beta2=0.9",
        "torchtitan.optimizer.eps=1e-6",
        "torchtitan.profiling.enable_profiling=true",
        "torchtitan.job.print_config=true",
        "torchtitan.parallelism.expert_tensor_parallel_degree=1",
        "torchtitan.parallelism.spmd_backend=partial_dtensor",  # a key that 0.2.x does not have
        "parallel.tensor=2",
        processes=2,
    )
    group = config.optimizer.param_groups[0].optimizer_kwargs
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.9), 1e-6)
    assert type(config.activation_checkpoint) is FullAC.Config and config.profiler.enable_profiling
    assert config.debug.print_config and config.debug.deterministic
    assert config.parallelism.spmd_backend == "partial_dtensor"
    assert (config.dump_folder, config.dataloader.dataset) == ("outputs/quickstart", "torch_sources")
    assert (config.validator.freq, config.validator.dataloader.dataset) == (40, "torch_sources_heldout")
    assert config.parallelism.tensor_parallel_degree == 2


def test_what_a_recipe_does_not_say_is_torchtitans_default(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text('framework = "torchtitan"\nconfig = "llama3_debug"')
    config = config_of(name=str(path))
    assert type(config.activation_checkpoint) is SelectiveAC.Config
    assert (config.training.seq_len, config.optimizer.param_groups[0].optimizer_kwargs["lr"]) == (2048, 8e-4)


@pytest.mark.parametrize(
    "change, text",
    [
        ("torchtitan.training.stepz=5", r"unknown key \[torchtitan.training\] stepz of torchtitan .*mean 'steps'"),
        ("torchtitan.experimental.custom_import=x", r"unknown table \[torchtitan.experimental\] of torchtitan 0\.3"),
        ("torchtitan.flashmoe.moe=stock", r"unknown table \[torchtitan.flashmoe\]"),
        ("torchtitan.training.max_norm=x", r"\[torchtitan.training\] max_norm = 'x': .*valid number"),
        ("swap.dispatch=flashmoe", r'dispatch = "flashmoe" is not there yet for torchtitan 0\.3'),
        ("torchtitan.training=3", r"\[torchtitan.training\] must be a table, found 3"),
        ("torchtitan.activation_checkpoint.selective_ac_option='2'", r"selective_ac_option = '2': torchtitan 0\.3"),
        (
            "torchtitan.validation.seq_len=64",
            r"\[validation\] seq_len = 64: .* validates with \[training\]",
        ),
        ("torchtitan.parallelism.expert_tensor_parallel_degree=2", r"expert_tensor_parallel_degree = 2: .*no such"),
        ("torchtitan.model.converters=['float8']", r"converters = \['float8'\]: torchtitan 0\.3.* has none"),
        ("torchtitan.parallelism.spmd_backend=x", r"\[torchtitan.parallelism\] spmd_backend = 'x': .*partial_dtensor"),
        ("torchtitan.checkpoint.keep_latest_k=1", r"torchtitan: We need to maintain at least 2"),
        (
            "torchtitan.activation_checkpoint.force_recompute_mm_shapes_by_fqns=['a']",
            r"\[activation_checkpoint\] force_recompute_mm_shapes_by_fqns = \['a'\] has no effect on the mode",
        ),
        ("parallel.tensor=3", r"tensor_parallel_degree 3: .* \(said by \[parallel\] tensor\)"),
        ("parallel.context=2", r"needs a multiple of 2 processes, found 1 \(said by \[parallel\] context\)"),
        ("swap.attention=stock", r"stock attention of torchtitan 0\.3.* cannot train on a CPU"),
        ("torchtitan.optimizer.beta2=1.5", r"\[optimizer\] beta2 must be a float, at least 0.0 and .* found 1.5"),
        ("torchtitan.optimizer.eps=-1.0", r"\[optimizer\] eps must be at least 0, found -1.0"),
        ("torchtitan.training.gc_freq=0", r"\[training\] gc_freq must be at least 1, found 0"),
        (
            "torchtitan.compile.components=['all']",
            r"\[compile\] components = 'all' does not exist; possible: loss, mod",
        ),
    ],
)
def test_what_it_cannot_do_is_named(change: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config_of(change)


@pytest.mark.parametrize(
    "changes, processes, text",
    [
        (("training.seq_len=60",), 1, r"\[training\] seq_len = 60 must be a multiple of 8, because of the 8 pieces in"),
        (
            ("training.seq_len=33", "parallel.tensor=2"),
            2,
            "seq_len = 33 must be a multiple of 2, .* tensor_parallel_degree 2",
        ),
        (
            ("torchtitan.profiling.enable_profiling=true", "torchtitan.profiling.profile_freq=3"),
            1,
            "profile_freq must be at least 4, which is profiler_warmup",
        ),
        (
            ("torchtitan.profiling.enable_memory_snapshot=true", "torchtitan.profiling.memory_snapshot_freq=0"),
            1,
            "memory_snapshot_freq must be at least 1, found 0",
        ),
        (("model.mla.kv_lora_rank=33",), 1, r"\[model.mla\] kv_lora_rank = 33 must be even"),
        (("model.vocab_size=513", "parallel.tensor=2"), 2, "2 does not divide the vocabulary of 513 "),
        (("parallel.pipeline=9", "training.global_batch_size=9", "parallel.expert=1"), 9, "6 layers into 9 stages"),
        (
            ("torchtitan.parallelism.pipeline_parallel_schedule=PipelineScheduleSingle", "parallel.pipeline=2"),
            2,
            "'PipelineScheduleSingle' is no schedule",
        ),
        (
            ("parallel.expert=1", "model.moe.num_experts=3", "model.moe.moe_intermediate_size=98"),
            4,
            r"4 processes share 3 experts, and FSDP over 4 of them does not divide an expert's hidden dim \(98\)",
        ),
    ],
)
def test_sizes_must_fit(changes: tuple[str, ...], processes: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config_of(*changes, processes=processes)


def test_context_parallelism_with_swapped_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="context_parallel_degree > 1 is not supported with swapped attention"):
        config_of("parallel.context=2", "parallel.expert=1", processes=2)


def test_documents_are_the_recipes_choice() -> None:
    """0.2.x attends over whole sequences unless it is told otherwise; so does a recipe here."""
    assert type(config_of().dataloader) is WholeSequences.Config
    assert type(config_of().validator.dataloader) is WholeSequences.Config
    assert type(config_of("data.document_masks=true").dataloader) is not WholeSequences.Config


def test_yarn_begins_beyond_the_original_length() -> None:
    name = "deepseek_v3_16b_4gpu"

    def scaling(seq_len: int) -> str:
        tables = recipes.job_of(recipe.load(name, [f"training.seq_len={seq_len}"]), 4).tables
        return job.parse(tables).model_spec.model.first_attention.rope.scaling

    assert (scaling(4096), scaling(8192)) == ("none", "yarn")


def test_cuda_graphs_stay_on_where_torchtitan_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def graphs(*changes: str) -> bool:
        return not config_of(*changes, processes=2).training.disable_cuda_graphs

    assert not graphs("parallel.expert=1")  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert graphs("parallel.expert=1") and graphs("parallel.expert=1", "parallel.tensor=2")
    assert not graphs("parallel.expert=2")
    assert not graphs("parallel.expert=1", "parallel.pipeline=2")
    assert not graphs("parallel.expert=1", "torchtitan.training.disable_cuda_graphs=true")


def test_job_files_of_the_other_generation_are_read(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        '[job]\ndescription = "x"\ncustom_config_module = "flashmoe_train.integrations.torchtitan"\n'
        '[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\nconverters = ["flashmoe"]\n[training]\nsteps = 3\n'
        '[flashmoe]\nmoe = "stock"\n'
    )
    config = config_of(name=str(path))
    assert config.training.steps == 3 and config.model_spec.flavor == "debugmodel"
    assert [name.rpartition(".")[2] for name in config.override.imports] == [
        "flex_attention",
        "varlen_attention",
        "checkpointing",
    ]
    for change, text in (
        ("model.name=llama33", r"\[model\] name = 'llama33' is not a model; did you mean 'llama3'"),
        ("model.flavor=debug", r"\[model\] flavor = 'debug' does not exist; did you mean 'debugmodel'"),
        ("model.name=flux", r"\[model\] (name = 'flux' is not a|flavor = 'debugmodel' does not exist)"),
    ):
        with pytest.raises(UsageError, match=text):
            config_of(change, name=str(path))
