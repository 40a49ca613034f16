"""What a recipe and a config may say, and how a mistake in them is named."""

from pathlib import Path
from typing import Any

import pytest

from flashmoe_train.errors import UsageError
from flashmoe_train.recipe import find, load, read
from flashmoe_train.resources import resource
from flashmoe_train.schema import Model, Recipe, parse

SIZES = {
    "architecture": "llama3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("path", sorted(resource("configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert parse(Model, read(path)).architecture in path.stem or path.stem.startswith("qwen3")


@pytest.mark.parametrize("path", sorted(resource("recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    name = str(path.relative_to(resource("recipes")).with_suffix(""))
    assert find(name) == path
    recipe = load(name)
    assert recipe.model is not None and recipe.folder == f"outputs/{path.stem}"


def test_numbers_and_nothing_else() -> None:
    recipe = parse(Recipe, {"framework": "torchtitan", "training": {"learning_rate": 1, "steps": 3}})
    assert (recipe.training.learning_rate, recipe.training.steps, recipe.training.seq_len) == (1.0, 3, None)
    assert (recipe.swap.attention, recipe.swap.moe, recipe.swap.dispatch) == ("flashmoe", "flashmoe", "stock")


@pytest.mark.parametrize(
    "tables, text",
    [
        ({"trainin": {}}, r"^unknown table \[trainin\]; did you mean 'training'\?$"),
        ({"training": {"stepz": 3}}, r"^unknown key \[training\] stepz; did you mean 'steps'\?$"),
        ({"folders": "x"}, r"^unknown key folders; did you mean 'folder'\?$"),
        ({"framework": "deepspeed"}, r"^framework = 'deepspeed': Input should be 'torchtitan' or 'megatron'$"),
        ({"training": 3}, r"^\[training\] must be a table, found 3$"),
        ({"training": {"steps": "10"}}, r"^\[training\] steps = '10': .*valid integer$"),
        ({"training": {"steps": 0}}, r"^\[training\] steps = 0: .*greater than or equal to 1$"),
        ({"training": {"compile": "False"}}, r"^\[training\] compile = 'False': .*valid boolean$"),
        ({"training": {"precision": "fp8"}}, r"^\[training\] precision = 'fp8': .*'bfloat16' or 'float32'$"),
        ({"swap": {"attention": "fast"}}, r"^\[swap\] attention = 'fast': .*'flashmoe' or 'stock'$"),
        ({"swap": {"dispatch": "deepep"}}, r"^\[swap\] dispatch = 'deepep': .*'flashmoe' or 'stock'$"),
        ({"swap": {"dispatch_capacity": 0.0}}, r"^\[swap\] dispatch_capacity = 0.0: .*greater than 0$"),
        ({"parallel": {"expert": "all"}}, r"^\[parallel\] expert = 'all': .*valid integer; or .*'auto'$"),
        ({"parallel": {"tensor": 0}}, r"^\[parallel\] tensor = 0: .*greater than or equal to 1$"),
        ({"data": {"train": 3}}, r"^\[data\] train = 3: .*valid string; or .*valid dictionary$"),
    ],
)
def test_names_the_mistake_in_a_recipe(tables: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(Recipe, {"framework": "torchtitan"} | tables)


@pytest.mark.parametrize(
    "tables, text",
    [
        ({"training": {"validate_steps": 3}}, r"^\[training\] validate_steps needs \[data\] heldout"),
        ({"data": {"heldout": {"path": "x"}}}, r"^\[data\] heldout needs a split"),
        ({"training": {"learning_rate": float("inf")}}, r"^\[training\] learning_rate = inf: .*finite"),
        ({"training": {"seed": 10**22}}, r"^\[training\] seed = 1"),
    ],
)
def test_refuses_what_would_fail_later(tables: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(Recipe, {"framework": "torchtitan"} | tables)


def test_names_several_mistakes_at_once() -> None:
    with pytest.raises(UsageError) as error:
        parse(Recipe, {"framework": "torchtitan", "training": {"steps": 1.5, "seed": "x"}, "dta": {}})
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"architecture": "llama4"}, r"^\[model\] architecture = 'llama4': .*'llama3', 'qwen3_moe' or 'deepseek_v3'$"),
        ({"hidden_sizes": 3}, r"^unknown key \[model\] hidden_sizes; did you mean 'hidden_size'\?$"),
        (
            {"num_attention_heads": 5},
            r"^\[model\] num_attention_heads does not divide hidden_size \(64\)",
        ),
        ({"num_key_value_heads": 3}, r"^\[model\] num_key_value_heads does not divide num_attention_heads \(4\)$"),
        ({"moe": EXPERTS}, r"^\[model\] llama3 has no table \[moe\]$"),
        ({"architecture": "qwen3_moe"}, r"^\[model\] qwen3_moe needs a table \[moe\]$"),
        ({"architecture": "deepseek_v3", "moe": EXPERTS}, r"^\[model\] deepseek_v3 needs a table \[mla\]$"),
        ({"rope_scaling": YARN}, r"^\[model\] llama3 has no rope_scaling 'yarn'$"),
        ({"rope_scaling": YARN | {"facto": 1}}, r"^unknown key \[model.rope_scaling\] facto; did you mean 'factor'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"^\[model\] rope_scaling = .*'llama3', 'yarn'$"),
        (
            {"moe": {"num_experts": 8}},
            r"^\[model.moe\] num_experts_per_tok is missing\n.*moe_inter",
        ),
        ({"moe": EXPERTS | {"num_experts_per_tok": 9}}, r"^\[model.moe\] num_experts_per_tok is more than num_experts"),
        ({"moe": EXPERTS | {"n_group": 2}}, r"^\[model.moe\] n_group and topk_group go together$"),
        (
            {"moe": EXPERTS | {"n_group": 3, "topk_group": 1}},
            r"^\[model.moe\] n_group does not divide num_experts",
        ),
        ({"moe": EXPERTS | {"n_group": 8, "topk_group": 3}}, r"^\[model.moe\] n_group leaves one expert to a group"),
        ({"moe": EXPERTS | {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 1}}, r"topk_group × 2 experts of a"),
        ({"architecture": "qwen3_moe", "moe": EXPERTS, "head_dim": 7}, r"^\[model\] head_dim = 7: .*multiple of 2$"),
        ({"rope_scaling": {"factor": 3}}, r"^\[model.rope_scaling\] rope_type is missing$"),
        ({"moe": EXPERTS | {"n_group": 2, "topk_group": 3}}, r"^\[model.moe\] topk_group is more than n_group \(2\)$"),
        (
            {"architecture": "deepseek_v3", "moe": EXPERTS, "mla": LATENT, "head_dim": 64},
            r"^\[model\] with \[mla\] heads have their sizes from there",
        ),
        (
            {"architecture": "qwen3_moe", "moe": EXPERTS | {"first_k_dense_replace": 3}},
            r"^\[model\] first_k_dense_replace is more than num_hidden_layers \(2\)$",
        ),
    ],
)
def test_names_the_mistake_in_a_model(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(Model, SIZES | changes, "model")
