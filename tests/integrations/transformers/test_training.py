"""Training of swapped Transformers models with what people train them with: the Trainer, gradient checkpointing,
torch.compile, FSDP2 through accelerate, LoRA through PEFT."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashmoe_train

from ... import processes
from .models import LENGTH, Calls, build, calls, check_equal, inputs, no_stock, outcome

assert calls  # a fixture

STEPS = 20


def examples(count: int = 64) -> list[dict[str, list[int]]]:
    """Sequences of several lengths that can be learnt: each token is the one before it plus a step of its sequence."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length, first, step = (
            int(torch.randint(*bounds, (), generator=generator)) for bounds in ((6, LENGTH), (3, 90), (1, 4))
        )
        found.append({"input_ids": [3 + (first + step * i) % 90 for i in range(length)]})
    return found


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right, without loss on padding."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    ids = torch.tensor(padded)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


@pytest.mark.parametrize("model_type, checkpointing", [("qwen3_moe", False), ("mistral", True), ("deepseek_v3", False)])
def test_trainer_trains_the_same(model_type: str, checkpointing: bool, tmp_path: Path, calls: Calls) -> None:
    """20 steps on padded batches: every loss, and every weight at the end."""
    from transformers import Trainer, TrainingArguments

    ends, losses = [], []
    for swapped in (False, True):
        model = build(model_type)
        if swapped:
            flashmoe_train.swap(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(swapped)),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            adam_epsilon=1e-3,  # Adam would divide by gradients near 0, and make rounding as large as steps
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples(), data_collator=collate)
        with no_stock():
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        ends.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    assert len(losses[0]) == STEPS and min(losses[0][-5:]) < losses[0][0] - 0.5
    assert len(calls) >= STEPS * 2
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-4)
    for name, want in ends[0].items():
        assert (ends[1][name] - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["left", "packed"])
def test_gradient_checkpointing(case: str, reentrant: bool, calls: Calls) -> None:
    model, given = build("qwen3_moe").train(), inputs(case)
    wanted = outcome(model, given)
    flashmoe_train.swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with no_stock():
        check_equal(outcome(model, given), wanted)
    assert len(calls) == 2 * 4  # attention and experts of two layers, all computed twice


@pytest.mark.parametrize("model_type, case", [("qwen3_moe", "plain"), ("mistral", "left"), ("deepseek_v3", "packed")])
def test_compiles_whole(model_type: str, case: str) -> None:
    """In one graph, masks and all; nothing is read on the host."""
    model, given = build(model_type), inputs(case)
    wanted = outcome(model, given)
    flashmoe_train.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with no_stock():
        found = {name.removeprefix("_orig_mod."): value for name, value in outcome(compiled, given).items()}
    check_equal(found, wanted)


@pytest.mark.parametrize("first", ["swap", "lora"])
def test_lora(first: str, calls: Calls) -> None:
    """On the projections, which a swap leaves as they are; only the adapters train."""
    from peft import LoraConfig, get_peft_model

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        return model.eval()  # its own dropout is none

    given = inputs("left")
    wanted = outcome(adapted(build("qwen3_moe")), given)
    if first == "swap":
        base = build("qwen3_moe")
        flashmoe_train.swap(base)
        model = adapted(base)
    else:
        model = adapted(build("qwen3_moe"))
        flashmoe_train.swap(model)
    with no_stock():
        found = outcome(model, given)
    assert len(calls) == 4 and len(found) == 1 + 2 * 2 * 2  # logits; A and B of two projections of two layers
    check_equal(found, wanted)


def _losses_under_fsdp(steps: int, folder: str, swapped: bool) -> None:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3MoeDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # It takes FSDP for a matter of GPUs, and would choose DDP here; what it does for FSDP2 runs on CPUs as well.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = build("qwen3_moe")
    if swapped:
        flashmoe_train.swap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert type(model).__name__.startswith("FSDP")
    rows, rank, losses = examples(), accelerator.process_index, []
    for step in range(steps):
        batch = collate(rows[8 * step + 4 * rank : 8 * step + 4 * rank + 4])
        with no_stock():
            loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]))
    if rank == 0:
        torch.save(torch.stack(losses), f"{folder}/{swapped}.pt")


def _both_under_fsdp(steps: int, folder: str) -> None:
    for swapped in (False, True):
        _losses_under_fsdp(steps, folder, swapped)


def test_fsdp2_through_accelerate(tmp_path: Path) -> None:
    """Two processes, sharded by layer: every process's loss of every step."""
    processes.run(_both_under_fsdp, 5, str(tmp_path))
    stock, swapped = (torch.load(tmp_path / f"{name}.pt") for name in (False, True))
    assert stock.shape == (5, 2) and not torch.equal(stock[:, 0], stock[:, 1])
    torch.testing.assert_close(swapped, stock, rtol=1e-4, atol=1e-4)


def test_a_copy_is_swapped_too() -> None:
    """A configuration is copied with its model; setting one back leaves the other."""
    model = build("llama")
    report = flashmoe_train.swap(model)
    twin: Any = copy.deepcopy(model)
    report.revert()
    assert (model.config._attn_implementation, twin.config._attn_implementation) == ("eager", "flashmoe")
