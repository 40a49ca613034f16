"""What `flashmoe explain` says of a recipe."""

import io

import pytest
from rich.console import Console

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.explain import Explanation
from flashmoe_train.integrations.torchtitan.explain import explain


def explained(*overrides: str, name: str = "quickstart", processes: int = 2, everything: bool = False) -> Explanation:
    return explain(recipe.load(name, overrides), processes, everything)


def test_says_what_the_recipe_comes_to() -> None:
    found = explained("training.global_batch_size=16", "torchtitan.optimizer.eps=1e-6")
    settings = {setting.key: setting[1:] for setting in found.settings}
    assert found.model.startswith("deepseek_v3: 13.9 million parameters, 9.0 million at work")
    assert found.processes == "2: FSDP 2; experts over 2"
    assert found.step == (
        "2,048 tokens = 16 sequences of 128; each of 2 data-parallel processes takes 4 at once in 2 turns"
    )
    assert settings["training.steps"] == (80, "[training] steps")
    assert settings["optimizer.eps"] == (1e-6, "[torchtitan]")
    assert settings["training.mixed_precision_param"] == ("float32", "flashmoe train")
    assert "optimizer.beta1" not in settings
    assert [row[2:] for row in found.swaps.summary()] == [
        ("FlashMoEAttention", 6),
        ("FlashMoEBlock", 5),
        ("FlashMoEExperts", 5),
    ]
    assert [operator for operator, _ in found.operators] == ["attention", "moe"]


def test_everything_lists_the_frameworks_defaults() -> None:
    settings = {setting.key: setting.said_by for setting in explained(everything=True).settings}
    assert settings["optimizer.beta1"] == "TorchTitan's default"


def test_dense_models_have_no_experts_to_explain() -> None:
    found = explained(name="llama3_debug")
    assert [operator for operator, _ in found.operators] == ["attention"] and "at work" not in found.model


def test_refuses_what_could_not_be_trained() -> None:
    with pytest.raises(UsageError, match=r"context_parallel_degree 2: TorchTitan 0.2 has no .* document masks"):
        explained("parallel.context=2", "data.document_masks=true")
    with pytest.raises(UsageError, match="needs a multiple of 3 processes, found 2"):
        explained("parallel.tensor=3")


def test_prints_names_in_brackets() -> None:
    text = io.StringIO()
    explained().print(Console(file=text, width=120))
    for part in ("[training] steps", "['flashmoe']", "deepseek_v3: 13.9 million", "layers.*.moe.experts", "float32"):
        assert part in text.getvalue()
