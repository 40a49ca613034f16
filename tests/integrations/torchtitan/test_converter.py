"""What the converter swaps, leaves alone and refuses."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from flashmoe_train import versions
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.sizes import check_kernels
from flashmoe_train.integrations.torchtitan.config import FlashMoE, validate
from flashmoe_train.integrations.torchtitan.converters import compat, job, plan
from flashmoe_train.integrations.torchtitan.converters.attention import FlashMoEAttention
from flashmoe_train.integrations.torchtitan.converters.converter import FlashMoEConverter

from .jobs import tables_of


def dims(**enabled: bool) -> types.SimpleNamespace:
    names = ("fsdp_enabled", "tp_enabled", "pp_enabled", "ep_enabled", "etp_enabled", "cp_enabled")
    degrees = {"tp": 1, "cp": 2 if enabled.get("cp_enabled") else 1, "ep": 2 if enabled.get("ep_enabled") else 1}
    return types.SimpleNamespace(**{name: enabled.get(name, False) for name in names}, **degrees)


def config(**tables: dict):
    values = tables_of("llama3", "debugmodel", Path("unused"))
    for table, entries in tables.items():
        values.setdefault(table, {}).update(entries)
    return job.parse(values)


def build(flavor: str, model: str = "llama3") -> torch.nn.Module:
    spec = job.get_train_spec(model)
    with torch.device("meta"):
        return spec.model_cls(spec.model_args[flavor])


def test_swaps_every_layer_and_keeps_the_state_dict() -> None:
    model = build("debugmodel")
    before = list(model.state_dict())
    FlashMoEConverter(config(), dims()).convert(model)
    assert all(type(layer.attention.inner_attention) is FlashMoEAttention for layer in model.layers.values())
    assert list(model.state_dict()) == before
    assert FlashMoEConverter.last_report.summary() == [
        ("layers.*.attention.inner_attention", "ScaledDotProductAttentionWrapper", "FlashMoEAttention", 6)
    ]


def test_saves_the_operator_in_selective_checkpointing() -> None:
    from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

    FlashMoEConverter(config(), dims()).convert(build("debugmodel"))
    assert torch.ops.flashmoe.attention_forward.default in _op_sac_save_list


def test_swaps_attention_and_moe_blocks() -> None:
    from torchtitan.models.qwen3.infra.parallelize import _op_sac_save_list

    model = build("debugmodel_moe", "qwen3")
    before = list(model.state_dict())
    FlashMoEConverter(config(model={"name": "qwen3", "flavor": "debugmodel_moe"}), dims()).convert(model)
    assert [row[2:] for row in FlashMoEConverter.last_report.summary()] == [
        ("FlashMoEAttention", 8),
        ("FlashMoEBlock", 8),
        ("FlashMoEExperts", 8),
    ]
    assert list(model.state_dict()) == before
    assert {torch.ops.flashmoe.moe_forward.default, torch.ops.flashmoe.route_plan.default} <= _op_sac_save_list


DISPATCH = {"dispatch": "flashmoe", "dispatch_capacity": 1.5}
EXPERTS = {"name": "qwen3", "flavor": "debugmodel_moe"}


def test_swaps_the_exchange_where_experts_are_shared() -> None:
    model = build("debugmodel_moe", "qwen3")
    before = list(model.state_dict())
    tables = {"model": EXPERTS, "flashmoe": DISPATCH, "validation": {"enable": True, "local_batch_size": 8}}
    FlashMoEConverter(config(**tables), dims(ep_enabled=True)).convert(model)
    found = {row[2:] for row in FlashMoEConverter.last_report.summary()}
    assert {("FlashMoESharedBlock", 8), ("FlashMoESharedExperts", 8), ("FlashMoEReorderer", 8)} <= found
    assert list(model.state_dict()) == before
    experts = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "FlashMoESharedExperts"]
    assert all(m.layer == name and m.shared.capacity == 1.5 for name, m in experts)
    assert experts[0][1].shared.tokens == 8 * 2048  # of validation, whose batches are larger
    alone = build("debugmodel_moe", "qwen3")
    FlashMoEConverter(config(**tables), dims()).convert(alone)  # no effect where nothing is exchanged
    assert not any(type(m).__name__.startswith("FlashMoEShared") for m in alone.modules())


@pytest.mark.parametrize(
    "tables, enabled, text",
    [
        ({"flashmoe": DISPATCH | {"moe": "stock"}}, {}, 'it needs moe = "flashmoe", found "stock"'),
        ({"flashmoe": DISPATCH | {"dispatch_capacity": 0.0}}, {}, r"dispatch_capacity must be positive, found 0\.0"),
        ({"flashmoe": DISPATCH}, {"etp_enabled": True}, "expert_tensor_parallel_degree > 1 is not supported"),
        ({"parallelism": {"pipeline_parallel_schedule": "DualPipeV"}}, {"pp_enabled": True}, "DualPipeV"),
        ({"parallelism": {"expert_parallel_comm_backend": "deepep"}}, {}, "deepep.* contradicts"),
        ({"optimizer": {"early_step_in_backward": True}}, {}, "early_step_in_backward cannot skip steps"),
    ],
)
def test_refuses_what_the_exchange_cannot_do(tables: dict, enabled: dict, text: str) -> None:
    model = build("debugmodel_moe", "qwen3")
    with pytest.raises(UsageError, match=text):
        FlashMoEConverter(
            config(**({"model": EXPERTS, "flashmoe": DISPATCH} | tables)), dims(ep_enabled=True, **enabled)
        ).convert(model)


def test_one_part_alone() -> None:
    model = build("debugmodel_moe", "qwen3")
    FlashMoEConverter(config(flashmoe={"attention": "stock"}), dims()).convert(model)
    assert {row.became for row in FlashMoEConverter.last_report.rows} == {"FlashMoEBlock", "FlashMoEExperts"}


def test_stock_swaps_nothing() -> None:
    model = build("debugmodel")
    FlashMoEConverter(config(flashmoe={"attention": "stock", "moe": "stock"}), dims()).convert(model)
    assert not any(isinstance(module, FlashMoEAttention) for module in model.modules())
    assert FlashMoEConverter.last_report.rows == []


def test_a_model_without_our_table_gets_the_defaults() -> None:
    tables = tables_of("llama3", "debugmodel", Path("unused"))
    del tables["flashmoe"], tables["job"]["custom_config_module"]
    assert FlashMoEConverter(job.parse(tables), dims()).config == FlashMoE()


def test_masks_that_are_not_documents_are_refused_with_the_reason() -> None:
    model = build("debugmodel_flex_attn")
    model.model_args = dataclasses.replace(model.model_args, attn_mask_type="sliding")
    with pytest.raises(UsageError, match="FlexAttentionWrapper: its masks are neither causal nor document masks"):
        FlashMoEConverter(config(), dims()).convert(model)


def test_refuses_document_masks_under_pipeline_parallelism() -> None:
    with pytest.raises(UsageError, match="cannot split document masks into microbatches"):
        FlashMoEConverter(config(model={"flavor": "debugmodel_flex_attn"}), dims(pp_enabled=True))


@pytest.mark.parametrize(
    "tables, others, text",
    [
        ({"model": {"name": "qwen3"}}, {"tp_enabled": True}, "tensor_parallel_degree > 1 together .* qwen3's"),
        ({}, {"pp_enabled": True}, "pipeline_parallel_degree > 1 together are not tested"),
        ({"parallelism": {"context_parallel_load_balancer": "ptrr"}}, {}, "\"headtail\" alone, found 'ptrr'"),
        ({"training": {"seq_len": 130}}, {}, "cuts a sequence into 4, which does not divide seq_len = 130"),
    ],
)
def test_refuses_what_context_parallelism_cannot_do(tables: dict, others: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        FlashMoEConverter(config(**tables), dims(cp_enabled=True, **others))
    FlashMoEConverter(config(), dims(cp_enabled=True))


def test_refuses_float8() -> None:
    with pytest.raises(UsageError, match="float8"):
        FlashMoEConverter(config(model={"converters": ["float8", "flashmoe"]}), dims())


def test_stock_parts_are_not_refused_for_what_the_swap_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stock = config(flashmoe={"attention": "stock"}, model={"flavor": "debugmodel_flex_attn"})
    FlashMoEConverter(stock, dims(cp_enabled=True))
    FlashMoEConverter(stock, dims(pp_enabled=True))


def test_stock_document_masks_are_refused_where_they_cannot_train() -> None:
    tables = {"flashmoe": {"attention": "stock"}, "model": {"flavor": "debugmodel_flex_attn"}}
    with pytest.raises(UsageError, match="cannot train with document masks on a CPU"):
        FlashMoEConverter(config(**tables), dims())
    FlashMoEConverter(config(**tables, checkpoint={"create_seed_checkpoint": True}), dims())


def test_blocks_of_another_class_are_refused_rather_than_left_stock() -> None:
    model = build("debugmodel", "gpt_oss")
    with pytest.raises(UsageError, match="GptOssMoE: a class derived from what is swapped"):
        FlashMoEConverter(config(flashmoe={"attention": "stock"}), dims()).convert(model)


@pytest.mark.parametrize(
    "choices, text",
    [
        (FlashMoE(), "no compiled attention.*; .*no compiled mixture-of-experts.*; --allow-fallback"),
        (FlashMoE(attention="stock"), "^this installation has no compiled mixture-of-experts"),
    ],
)
def test_refuses_to_train_slowly_on_hopper(choices: FlashMoE, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job.get_train_spec("deepseek_v3").model_args["debugmodel"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for operator in ("attention", "moe"):
        monkeypatch.setattr(f"flashmoe_train.ops.{operator}.has_kernel", lambda *_: False)
    with pytest.raises(UsageError, match=text):
        check_kernels(choices, "bfloat16", compat.sizes(spec))
    check_kernels(FlashMoE(attention="stock", moe="stock"), "bfloat16", compat.sizes(spec))
    dense = job.get_train_spec("llama3").model_args["debugmodel"]
    check_kernels(FlashMoE(attention="stock"), "bfloat16", compat.sizes(dense))  # it has no experts
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    check_kernels(choices, "bfloat16", compat.sizes(spec))


@pytest.mark.parametrize(
    "degrees, processes, wanted",
    [
        ({}, 1, "bfloat16"),  # autocast
        ({"data_parallel_replicate": 2, "data_parallel_shard": 1}, 2, "bfloat16"),
        ({"tensor_parallel": 2}, 2, "float32"),
        ({"tensor_parallel": 2}, 4, "bfloat16"),
        ({"pipeline_parallel": 2}, 2, "float32"),
        ({"tensor_parallel": 2, "context_parallel": 2}, 4, "bfloat16"),
    ],
)
def test_precision_is_mixed_by_fsdp_or_autocast(degrees: dict[str, int], processes: int, wanted: str) -> None:
    parallelism = {f"{name}_degree": degree for name, degree in degrees.items()}
    mixed = config(training={"mixed_precision_param": "bfloat16"}, parallelism=parallelism)
    assert plan.precision(mixed, processes) == wanted


def test_refuses_an_unknown_choice_where_torchtitan_does_not_check() -> None:
    with pytest.raises(UsageError, match=r"\[flashmoe\] attention must be 'flashmoe' or 'stock', found 'fast'"):
        validate(FlashMoE(attention="fast"))


def test_refuses_what_stock_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    selective = {"mode": "selective", "selective_ac_option": "op"}
    job_config = config(activation_checkpoint=selective, compile={"enable": True})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    with pytest.raises(UsageError, match=r"torch 2.13 cannot run tensor parallelism \+ compile \+ selective op"):
        compat.check_job(job_config, dims(tp_enabled=True), FlashMoE())
    compat.check_job(config(activation_checkpoint=selective), dims(tp_enabled=True), FlashMoE())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.11.0")
    compat.check_job(job_config, dims(tp_enabled=True), FlashMoE())


def test_every_feature_of_versions_toml_is_known() -> None:
    everything = config(
        activation_checkpoint={"mode": "selective", "selective_ac_option": "op"}, compile={"enable": True}
    )
    known = compat.features(everything, dims(tp_enabled=True, pp_enabled=True, ep_enabled=True))
    for entry in versions.broken("torchtitan", Version("2.13")):
        assert set(entry["features"]) <= known
