"""Work is kept: resuming, exchange with stock, runs that are killed while they save, Hugging Face's format."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.checkpoint_files import is_complete
from flashmoe_train.integrations.torchtitan import recipes
from flashmoe_train.integrations.torchtitan.converters import job

from ... import processes
from ..damaged import changed, flipped
from .runs import SMALL, train

slow = pytest.mark.slow

CHECKPOINTS = "checkpoint.every=3"


def forget(source: Path, target: Path, step: int) -> Path:
    """A copy of a run's folder as it was before that step's checkpoint."""
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
        shutil.rmtree(target / f"checkpoint/step-{step}")
    dist.barrier()
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, read as somebody would who does not trust it."""
    file = folder.with_suffix(".pt")
    dcp_to_torch_save(folder, file)
    return {name: tensor for name, tensor in torch.load(file, weights_only=True).items() if torch.is_tensor(tensor)}


def _resumes_and_exchanges(root: Path) -> None:
    stock = ("swap.attention=stock", "swap.moe=stock")
    whole = train(root / "whole", CHECKPOINTS)
    assert list(whole) == [1, 2, 3, 4, 5, 6] and whole[6] < whole[1] - 0.3
    # Bitwise, and so are the weights at the end: data, optimizer, schedule and expert biases all go on.
    resumed = train(forget(root / "whole", root / "resumed", 6), CHECKPOINTS)
    assert resumed == {step: whole[step] for step in (4, 5, 6)}
    # A checkpoint of swapped modules goes on in stock ones, and the other way round.
    to_stock = train(forget(root / "whole", root / "to_stock", 6), CHECKPOINTS, *stock)
    assert to_stock == pytest.approx({step: whole[step] for step in (4, 5, 6)}, abs=1e-5)
    train(root / "stock", CHECKPOINTS, *stock)
    to_ours = train(forget(root / "stock", root / "to_ours", 6), CHECKPOINTS)
    assert to_ours == pytest.approx({step: whole[step] for step in (4, 5, 6)}, abs=1e-5)
    # A finished run can be made longer.
    longer = (CHECKPOINTS, "checkpoint.asynchronous=true")
    assert list(train(root / "resumed", *longer, "training.steps=10")) == [7, 8, 9, 10]
    assert list(train(root / "resumed", *longer, "training.steps=11")) == [11]


def test_resumes_bitwise_and_exchanges_with_stock(tmp_path: Path) -> None:
    processes.run(_resumes_and_exchanges, tmp_path)
    final, again = (weights(tmp_path / f"{run}/checkpoint/step-6") for run in ("whole", "resumed"))
    assert final.keys() == again.keys() and all(torch.equal(final[name], again[name]) for name in final)


def _kill_at_save(rank: int, port: int, folder: Path, step: int, overrides: tuple[str, ...]) -> None:
    """Trains on two processes that are killed while they write the checkpoint of `step`."""
    finish = FileSystemWriter.finish

    def dying_finish(self: FileSystemWriter, metadata: Any, results: Any) -> None:
        if f"step-{step}" in str(self.path):  # all tensors are written, what says where they are is not
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, metadata, results)

    FileSystemWriter.finish = dying_finish
    processes.join(rank, 2, port)
    train(folder, CHECKPOINTS, *overrides)


def killed(folder: Path, step: int, *overrides: str) -> None:
    with pytest.raises(mp.ProcessExitedException) as error:
        processes.start(_kill_at_save, processes.free_port(), folder, step, overrides, processes=2)
    assert error.value.signal_name == "SIGKILL"


def _goes_on(root: Path, killed_at: int, overrides: tuple[str, ...]) -> None:
    whole = train(root / "whole", CHECKPOINTS, *overrides)
    resumed = train(root / "killed", CHECKPOINTS, *overrides)
    assert resumed == {step: loss for step, loss in whole.items() if step >= killed_at - 1}


ASYNCHRONOUS = ("checkpoint.every=2", "checkpoint.asynchronous=true")


@pytest.mark.parametrize("step, overrides", [(6, ("checkpoint.every=4",)), pytest.param(4, ASYNCHRONOUS, marks=slow)])
def test_killed_while_saving_the_previous_checkpoint_loads(
    step: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """Asynchronously, the next steps are being trained meanwhile."""
    killed(tmp_path / "killed", step, *overrides)
    half = tmp_path / f"killed/checkpoint/step-{step}"
    assert list(half.glob("*.distcp")) and not is_complete(half)
    processes.run(_goes_on, tmp_path, step, overrides)


def _starts_again(root: Path, start: str) -> None:
    assert train(root / "killed", CHECKPOINTS, start) == train(root / "not killed", CHECKPOINTS, start)


@slow
def test_killed_in_its_first_save_it_starts_from_the_weights_it_was_given(tmp_path: Path) -> None:
    processes.run(train, tmp_path / "given", CHECKPOINTS)
    start = f"checkpoint.start_from={tmp_path}/given/checkpoint/step-6"
    killed(tmp_path / "killed", 3, start)
    assert not is_complete(tmp_path / "killed/checkpoint/step-3")
    processes.run(_starts_again, tmp_path, start)


def _overwrites(root: Path) -> None:
    train(root / "run", CHECKPOINTS)
    FileSystemWriter.write_data = None  # as if killed before the first byte
    with pytest.raises(CheckpointException):
        train(root / "run", CHECKPOINTS, "torchtitan.checkpoint.load_step=3")


@slow
def test_killed_while_overwriting_leaves_no_mixture(tmp_path: Path) -> None:
    processes.run(_overwrites, tmp_path)
    assert not is_complete(tmp_path / "run/checkpoint/step-6") and is_complete(tmp_path / "run/checkpoint/step-3")


def _refuses(root: Path) -> None:
    train(root / "run", CHECKPOINTS)
    start = f"checkpoint.start_from={root}/run/checkpoint/step-6"
    for override, text in (
        (
            "model.hidden_size=128",
            r"step-6 does not fit the model: .*256\] there and \[.*128\] here.* more",
        ),
        ("model.num_hidden_layers=3", r"layers.2.* is not in it.* more"),
        ("model.num_hidden_layers=1", r"layers.1.* is not in the model.* more"),
    ):
        with pytest.raises(UsageError, match=text):
            train(root / "other", start, override)
    train(root / "alone", CHECKPOINTS, "torchtitan.checkpoint.last_save_model_only=true")
    with pytest.raises(UsageError, match="step-6 holds weights alone: a run can start from it, but not go on with it"):
        train(root / "alone", CHECKPOINTS, "training.steps=8")
    train(
        root / "theirs",
        CHECKPOINTS,
        "torchtitan.checkpoint.last_save_in_hf=true",
        "torchtitan.checkpoint.last_save_model_only=true",
    )
    with pytest.raises(UsageError, match="step-6 is in Hugging Face's format: a run cannot go on with it"):
        train(root / "theirs", CHECKPOINTS, "training.steps=8", "torchtitan.checkpoint.load_step=6")
    assert list((root / "theirs/checkpoint/step-6").glob("*.safetensors"))
    assert list(train(root / "new", f"checkpoint.start_from={root}/alone/checkpoint/step-6")) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    processes.run(_refuses, tmp_path)


def _refuses_alone(root: Path, processes_then: int) -> None:
    with pytest.raises(UsageError, match=f"was saved by {processes_then} data-parallel processes, these are 1"):
        train(root / "run", CHECKPOINTS, "training.steps=8")
    train(root / "new", f"checkpoint.start_from={root}/run/checkpoint/step-6")
    go_on = 'torchtitan.checkpoint.exclude_from_loading=["dataloader"]'
    assert list(train(root / "run", CHECKPOINTS, "training.steps=8", go_on)) == [7, 8]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    processes.run(train, tmp_path / "run", CHECKPOINTS)
    processes.run(_refuses_alone, tmp_path, 2, processes=1)


def _refuses_damaged(root: Path) -> None:
    train(root / "run", CHECKPOINTS)
    newest, older = (root / f"run/checkpoint/step-{step}" for step in (6, 3))
    more = (CHECKPOINTS, "training.steps=7")
    go_on = rf"\. A run cannot go on with this checkpoint; {older} is whole: remove {newest} and .* from step 3$"
    for name, change, text in (
        ("__1_0.distcp", lambda content: content[:-1000], "is cut off: .* bytes of "),
        ("__0_0.distcp", flipped, "is damaged: what lies at byte .* is not what was written"),
        ("__0_0.distcp", lambda content: None, "is missing"),
        (".metadata", lambda content: content[:100], "cannot be read"),
    ):
        with changed(newest / name, change), pytest.raises(UsageError, match=f"{newest}/{name} {text}.*{go_on}"):
            train(root / "run", *more)
    with changed(newest / "__0_0.distcp", flipped), changed(older / "__1_0.distcp", flipped):
        with pytest.raises(UsageError, match=f"there is no older one in {older.parent} that is whole"):
            train(root / "run", *more)
        with pytest.raises(UsageError, match=r"step-6/__0_0.distcp is damaged"):
            train(root / "new", f"checkpoint.start_from={newest}")
    assert list(train(root / "run", *more)) == [7]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    processes.run(_refuses_damaged, tmp_path)


def _trains(root: Path, name: str, *overrides: str) -> None:
    losses = train(root / name, CHECKPOINTS, "training.learning_rate=2e-4", *overrides)  # or rounding grows fast
    if dist.get_rank() == 0:
        (root / f"{name}.json").write_text(json.dumps(losses))


TP2, EP1, EP2, EP4 = ("parallel.tensor=2", *(f"parallel.expert={degree}" for degree in (1, 2, 4)))


@slow
@pytest.mark.parametrize("then, count, now", [((EP2,), 4, (TP2, EP4)), ((TP2, EP1), 1, (EP1,))])
def test_a_checkpoint_goes_on_with_other_shards(
    then: tuple[str, ...], count: int, now: tuple[str, ...], tmp_path: Path
) -> None:
    """Layouts with as many readers of the data, or the text would be another: weights and optimizer are cut anew."""
    processes.run(_trains, tmp_path, "then", *then)
    shutil.copytree(tmp_path / "then", tmp_path / "now")
    shutil.rmtree(tmp_path / "now/checkpoint/step-6")
    processes.run(_trains, tmp_path, "now", *now, processes=count)
    whole, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("then", "now"))
    assert found == pytest.approx({step: whole[step] for step in ("4", "5", "6")}, abs=1e-4)


def _refuses_in_a_pipeline(root: Path) -> None:
    start = f"checkpoint.start_from={root}/run/checkpoint/step-6"
    with pytest.raises(UsageError, match=r"layers.2.* is not in it"):  # the second stage has it, both say so
        train(root / "other", start, "parallel.pipeline=2", "model.num_hidden_layers=3", "parallel.expert=1")


def test_stages_of_a_pipeline_refuse_together(tmp_path: Path) -> None:
    processes.run(train, tmp_path / "run", CHECKPOINTS, processes=1)
    processes.run(_refuses_in_a_pipeline, tmp_path)


@pytest.mark.parametrize(
    "name, override, text",
    [
        (
            "qwen3_moe_debug",
            "model.moe.n_shared_experts=1",
            "qwen3_moe with softmax scores has no .* n_shared_experts = 1",
        ),
        ("qwen3_moe_debug", "model.moe.scoring_func=sigmoid", "qwen3_moe with sigmoid scores has no .* scoring_func"),
        (
            "deepseek_v3_debug",
            "model.moe.norm_topk_prob=true",
            "deepseek_v3 with softmax scores has no .* norm_topk_prob",
        ),
    ],
)
def test_an_export_that_would_be_another_model_is_refused(name: str, override: str, text: str) -> None:
    loaded = recipe.load(name, [override, "checkpoint.export=huggingface"])
    with pytest.raises(UsageError, match=rf"\[checkpoint\] export: Transformers' {text}"):
        recipes.job_of(loaded, 1)


def test_a_start_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[checkpoint\] start_from = .*neither a checkpoint .* nor Hugging Face's"):
        recipes.job_of(recipe.load("quickstart", [f"checkpoint.start_from={tmp_path}"]), 1)


def test_shared_keys_reach_torchtitan() -> None:
    changes = ("checkpoint.every=5", "checkpoint.keep=3", "checkpoint.asynchronous=true")
    found = job.parse(recipes.job_of(recipe.load("quickstart", changes), 1).tables).checkpoint
    assert (found.enable, found.interval, found.keep_latest_k, found.async_mode) == (True, 5, 3, "async")
    assert not found.last_save_model_only
    assert not job.parse(recipes.job_of(recipe.load("quickstart"), 1).tables).checkpoint.enable


SIGMOID = ("model.moe.scoring_func=sigmoid", "model.moe.norm_topk_prob=true", "model.moe.routed_scaling_factor=2.5")


def _exports(root: Path, name: str, overrides: tuple[str, ...]) -> None:
    train(
        root / "run", "checkpoint.every=6", "checkpoint.export=huggingface", "training.steps=2", *overrides, name=name
    )
    exported = f"checkpoint.start_from={root}/run/huggingface"
    same = f"checkpoint.start_from={root}/run/checkpoint/step-2"
    for choice in ("stock", "flashmoe"):
        swap = (f"swap.attention={choice}", f"swap.moe={choice}", *overrides)
        imported = train(root / f"hf {choice}", exported, *swap, name=name)
        # Stock's experts do not add up in the same order every time.
        assert imported == pytest.approx(train(root / f"dcp {choice}", same, *swap, name=name), abs=1e-5)
    if dist.get_rank() == 0:
        _equals_transformers(root, name, overrides)
    dist.barrier()


def model_type(root: Path) -> str:
    return json.loads((root / "run/huggingface/config.json").read_text())["model_type"]


def _equals_transformers(root: Path, name: str, overrides: tuple[str, ...]) -> None:
    """The same logits from TorchTitan's model and from Transformers', each with the weights from its own format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tables = recipes.job_of(recipe.load(name, [*SMALL, "data.document_masks=false", *overrides]), 1).tables
    arguments = job.model_args(tables)
    arguments.update_from_config(job.parse(tables))
    model = job.get_train_spec(tables["model"]["name"]).model_cls(arguments)
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))  # what is no weight: rotary frequencies
    missing = model.load_state_dict(weights(root / "run/checkpoint/step-2"), strict=False)[0]
    assert not missing
    if name == "qwen3_moe_debug":  # TorchTitan does not balance its experts, and the export has no bias
        assert not any(layer.moe.expert_bias.any() for layer in model.layers.values())
    if model_type(root) == "deepseek_v2":  # Transformers' has no bias that balances the load
        for layer in model.layers.values():
            layer.moe.expert_bias.zero_()
    folder = root / "run/huggingface"
    theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("def forward(self, x):")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


@slow
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("llama3_debug", ("model.num_key_value_heads=1",)),  # half a head in a process
        ("qwen3_moe_debug", ()),
        ("deepseek_v3_debug", SIGMOID),
        ("deepseek_v3_debug", ("model.moe.first_k_dense_replace=0",)),
    ],
)
def test_hugging_faces_format(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    processes.run(_exports, tmp_path, name, overrides)
    assert (tmp_path / "run/huggingface/model.safetensors").exists()
    config = json.loads((tmp_path / "run/huggingface/config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["eos_token_id"] == 257
