"""Weights under Hugging Face's names: the first loss from them is the other frameworks', and what is exported begins
another run alike, on any layout."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import explain, recipes, runner, weights
from flashmoe_train.schema import Recipe

from ... import processes
from .. import first_loss
from ..first_loss import FIRST_LOSSES, SMALL, UNBIASED
from . import jobs


def _recipe(name: str, root: Path, *overrides: str) -> Recipe:
    """One that ships for TorchTitan, under Megatron."""
    data = f"data.train={root / 'text.jsonl'}"
    loaded = recipe.load(name, [*SMALL, data, f"folder={root / 'run'}", "model.num_hidden_layers=3", *overrides])
    changes = {"framework": "megatron", "torchtitan": {}, "data": loaded.data.model_copy(update={"heldout": None})}
    training = loaded.training.model_copy(update={"warmup_steps": 0, "validate_every": None, "validate_steps": None})
    return loaded.model_copy(update={**changes, "training": training})


def _shapes(given: Recipe) -> dict[str, torch.Size]:
    """Of Hugging Face's tensors that the whole model is made of."""
    plan = recipes.resolve(given, 1)
    found = {}
    for name, own in explain.whole_model(given).named_parameters():
        layer, _, inside = (
            name.removeprefix("decoder.layers.").partition(".") if ".layers." in name else ("0", "", name)
        )
        place = weights.place(inside, plan.model, int(layer), range(plan.config.num_moe_experts or 0))
        found |= dict(zip(place.names, (part.shape for part in place.split(own)), strict=True))
    return found


def _write(root: Path, name: str, *overrides: str) -> None:
    (root / name).mkdir()
    first_loss.write_text(root / name)
    first_loss.write_weights(root / name, _shapes(_recipe(name, root / name, *overrides)))


def _first_losses(root: Path, runs: list[tuple[str, list[str]]]) -> None:
    for number, (name, overrides) in enumerate(runs):
        start = f"checkpoint.start_from={root / name / 'weights'}"
        run = jobs.train(_recipe(name, root / name, start, *overrides))
        if run is not None:
            (root / f"{number} {name}.json").write_text(json.dumps(run.losses))


def _assert_first(root: Path, runs: list[tuple[str, list[str]]]) -> None:
    for number, (name, _) in enumerate(runs):
        first_loss.assert_first(name, json.loads((root / f"{number} {name}.json").read_text()), FIRST_LOSSES | UNBIASED)


STOCK = ["swap.attention=stock", "swap.moe=stock"]
TP2 = ["parallel.tensor=2"]
EP2 = ["parallel.expert=2"]


def test_first_loss_is_that_of_other_frameworks(tmp_path: Path) -> None:
    for name in FIRST_LOSSES:
        _write(tmp_path, name)
    runs = [(name, []) for name in FIRST_LOSSES] + [(name, STOCK) for name in ("llama3_debug", "qwen3_moe_debug")]
    processes.run(_first_losses, tmp_path, runs, processes=1)
    _assert_first(tmp_path, runs)
    runs = [("llama3_debug", TP2), ("qwen3_moe_debug", TP2 + EP2), ("deepseek_v3_debug", TP2 + EP2)]
    runs += [("qwen3_moe_debug", TP2 + EP2 + STOCK)]
    processes.run(_first_losses, tmp_path, runs, processes=2)
    _assert_first(tmp_path, runs)


def _exports(root: Path) -> None:
    folder = root / "run"
    jobs.write_tokens(root) if dist.get_rank() == 0 else None
    dist.barrier()
    four, kept = "model.num_hidden_layers=4", f"data.train={root / 'tokens.bin'}"
    small = [four, kept, "checkpoint.export=huggingface"]
    # jobs' data has no tokenizer of its own; the byte tokenizer is exported
    given = jobs.recipe_of("moe", folder, root / "tokens.bin", *small)
    exported: dict[str, torch.Tensor] = {}

    def export(trainer: runner.Trainer) -> None:
        trainer.export()
        exported.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    jobs.train(given, export)
    start = f"checkpoint.start_from={folder / 'huggingface'}"
    again = jobs.recipe_of("moe", root / "again", root / "tokens.bin", four, start, "training.steps=3")

    def same(trainer: runner.Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), exported[name], rtol=0, atol=0)

    with mock.patch.object(runner.Trainer, "train", lambda trainer: None):
        jobs.train(again, same)


def _pipelines(root: Path) -> None:
    start = [f"checkpoint.start_from={root / 'run/huggingface'}", "training.steps=3", "model.num_hidden_layers=4"]
    layout = [] if dist.get_world_size() == 1 else ["parallel.pipeline=2"]
    run = jobs.train(jobs.recipe_of("moe", root / f"of {len(layout)}", root / "tokens.bin", *start, *layout))
    if run is not None:
        (root / f"{len(layout)}.json").write_text(json.dumps(run.losses))


def test_exported_weights_begin_another_run(tmp_path: Path) -> None:
    processes.run(_exports, tmp_path, processes=1)
    config = json.loads((tmp_path / "run/huggingface/config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["bos_token_id"] == 256
    processes.run(_pipelines, tmp_path, processes=1)
    processes.run(_pipelines, tmp_path, processes=2)
    one, two = (json.loads((tmp_path / f"{stages}.json").read_text()) for stages in (0, 1))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _write(tmp_path, "llama3_debug")
    runs = [("llama3_debug", ["model.intermediate_size=512"])]
    with pytest.raises(
        Exception, match=r"does not fit the model: .*gate_proj.* \[1536, 256\], here it is \[1024, 256\]"
    ):
        processes.run(_first_losses, tmp_path, runs, processes=1)


def test_export_needs_the_whole_model_on_a_process(tmp_path: Path) -> None:
    given = jobs.recipe_of(
        "dense", tmp_path, tmp_path, "checkpoint.export=huggingface", *TP2, "data.train=torch_sources"
    )
    with pytest.raises(UsageError, match=r"every process has to have the whole model, found \[parallel\] tensor = 2$"):
        recipes.resolve(given, 2)
    export = ("checkpoint.export=huggingface", "data.train=torch_sources", "parallel.expert=auto")
    given = jobs.recipe_of("moe", tmp_path, tmp_path, *export)
    recipes.resolve(given, 1)
    with pytest.raises(UsageError, match=r"expert = 2$"):
        recipes.resolve(given, 2)
