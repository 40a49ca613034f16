"""What Megatron is told by a recipe, and what a recipe cannot say."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flashmoe_train import recipe
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import recipes
from flashmoe_train.integrations.megatron.explain import explain

NAME = "megatron_moe_debug"
DISPATCH = ("swap.dispatch=flashmoe", "parallel.expert=2")
SHARED = "megatron.moe_shared_expert_intermediate_size=32"
FACTOR = "megatron.moe_expert_capacity_factor=1.0"
OVERLAP = ("megatron.overlap_moe_expert_parallel_comm=true", "training.precision=bfloat16")
TENSOR = "megatron.expert_tensor_parallel_size=2"


def plan(*overrides: str, processes: int = 1, name: str = NAME) -> recipes.Plan:
    return recipes.resolve(recipe.load(name, overrides), processes)


def test_shared_keys_reach_megatron() -> None:
    found = plan(
        "training.precision=bfloat16",
        "training.activation_checkpointing=full",
        "training.learning_rate=2e-3",
        "training.deterministic=true",
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.expert=4",
        "megatron.moe_z_loss_coeff=1e-3",
        "megatron.optimizer.clip_grad=0.5",
        "megatron.ddp.overlap_grad_reduce=false",
        "megatron.scheduler.lr_decay_style=cosine",
        processes=8,
    )
    config, optimizer = found.config, found.optimizer
    assert (config.num_layers, config.num_moe_experts, config.moe_ffn_hidden_size) == (4, 16, 192)
    assert config.activation_func is F.silu and config.qk_layernorm and not config.moe_router_pre_softmax
    assert config.deterministic_mode
    assert config.bf16 and config.params_dtype == config.pipeline_dtype == optimizer.params_dtype == torch.bfloat16
    assert config.recompute_granularity == "full" and config.sequence_parallel and config.moe_z_loss_coeff == 1e-3
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (4, 1)
    assert optimizer.lr == 2e-3 and optimizer.clip_grad == 0.5 and optimizer.use_distributed_optimizer
    assert found.ddp.overlap_param_gather and not found.ddp.overlap_grad_reduce
    assert found.scheduler["lr_decay_style"] == "cosine" and found.scheduler["lr_warmup_steps"] == 4
    layout = found.layout
    assert (layout.data, layout.micro_batch, layout.turns, layout.sequences) == (2, 4, 1, 8)


def test_experts_over_as_many_processes_as_divide_them() -> None:
    assert plan("training.global_batch_size=12", processes=6).layout.expert == 2
    assert plan("parallel.expert=1", "parallel.tensor=2", processes=2).config.expert_tensor_parallel_size == 2
    alone = plan("model.moe.norm_topk_prob=false")
    assert alone.config.moe_router_pre_softmax and alone.layout.expert == 1


def test_experts_by_our_exchange() -> None:
    given = (*DISPATCH, "parallel.tensor=2", "training.micro_batch_size=2", "swap.dispatch_capacity=1.5")
    found = plan(*given, processes=4).sharing
    assert found is not None and (found.tokens, found.capacity) == (2 * 128 // 2, 1.5)
    assert plan("swap.dispatch=flashmoe", "parallel.expert=1").sharing is None and plan(processes=2).sharing is None
    explained = explain(recipe.load(NAME, given), 4)
    assert explained.processes == (
        "4: data 2 × tensor 2; experts over 2, by our exchange of at most 128 tokens from each"
    )


@pytest.mark.parametrize("name, latent", [("deepseek_v3_16b", True), ("llama3_8b", False), ("qwen3_30b_a3b", False)])
def test_the_large_models_are_the_same(name: str, latent: bool, tmp_path: Path) -> None:
    """Their sizes, on the meta device, are those that TorchTitan's have (docs/recipes.md)."""
    text = f'framework = "megatron"\nconfig = "{name}"\n[training]\nsteps = 1\nseq_len = 8192\nlearning_rate = 1e-3\n'
    (tmp_path / "a.toml").write_text(text)
    found = explain(recipe.load(str(tmp_path / "a.toml")), 1)
    wanted = {"deepseek_v3_16b": "15,706.", "llama3_8b": "8,030.", "qwen3_30b_a3b": "30,53"}
    assert wanted[name] in found.model, found.model
    config = recipes.resolve(recipe.load(str(tmp_path / "a.toml")), 1).config
    if latent:
        assert config.rope_type == "yarn" and config.moe_layer_freq[:2] == [0, 1]


def test_explains_where_everything_is_from() -> None:
    found = explain(recipe.load(NAME, ["megatron.ddp.bucket_size=1000000"]), 2, everything=True)
    said = {setting.key: (setting.value, setting.said_by) for setting in found.settings}
    assert said["num_layers"] == (4, "[model]") and said["ddp.bucket_size"] == (1000000, "[megatron.ddp]")
    assert said["moe_aux_loss_coeff"] == (1e-3, "[megatron]") and said["activation_func"] == ("silu", "[model]")
    assert said["expert_model_parallel_size"] == (2, "[parallel] expert")
    assert said["init_method_std"] == (0.02, "Megatron's default")
    assert found.model.startswith("qwen3_moe: 11.3 million parameters, 4.2 million at work")
    assert found.processes == "2: data 2; experts over 2"
    assert found.step.startswith("1,024 tokens = 8 sequences of 128; each of 2 data-parallel processes takes 4 at once")
    assert ("decoder.layers.*.mlp.experts", "SequentialMLP", "FlashMoEExperts", 4) in found.swaps.summary()
    assert not explain(recipe.load(NAME, ["swap.attention=stock", "swap.moe=stock"]), 1).swaps.rows


@pytest.mark.parametrize(
    "overrides, processes, text",
    [
        (("megatron.num_layer=2",), 1, r"unknown key \[megatron\] num_layer; did you mean 'num_layers'"),
        (("megatron.optimzer.lr=2",), 1, r"unknown table \[megatron.optimzer\]; "),
        (("megatron.optimizer.rate=2",), 1, r"unknown key \[megatron.optimizer\] rate"),
        (("megatron.scheduler.warmup=2",), 1, r"unknown key \[megatron.scheduler\] warmup"),
        (("megatron.ddp=2",), 1, r"\[megatron.ddp\] must be a table, found 2"),
        (("megatron.num_layers=2",), 1, r"\[megatron\] num_layers = 2 contradicts \[model\], which sets it to 4"),
        (
            ("megatron.recompute_granularity=partial",),
            1,
            r"\[megatron\] recompute_granularity = 'partial': Inp.*'full'",
        ),
        (
            ("megatron.recompute_granularity=selective", "megatron.recompute_modules=['mlps']"),
            1,
            r"\[megatron\] TransformerConfig: .*mlps",
        ),
        (
            ("megatron.fp16=true", "training.precision=bfloat16"),
            1,
            r"fp16 = True contradicts \[training\] precision, .*",
        ),
        (
            ("megatron.fp16=true", "training.precision=float32"),
            1,
            r"fp16 = True contradicts \[training\] precision, .*",
        ),
        (("megatron.optimizer.fp16=true",), 1, r"\[megatron.optimizer\] fp16 = True contradicts"),
        (("megatron.hidden_dropout=true",), 1, r"\[megatron\] hidden_dropout = True: .*valid number"),
        (("megatron.moe_aux_loss_coeff=x",), 1, r"moe_aux_loss_coeff = 'x': .*valid number; or .*valid array"),
        (("megatron.attention_backend=flash",), 1, r"attention_backend = 'flash': Input should be 1, 2"),
        (("megatron.activation_func=gelu",), 1, r"\[megatron\] activation_func = 'gelu': a recipe cannot say it"),
        (("megatron.optimizer.exp_avg_dtype=bf16",), 1, r"exp_avg_dtype = 'bf16': a recipe cannot say it"),
        (("megatron.optimizer.clip_grad='1'",), 1, r"\[megatron.optimizer\] clip_grad = '1': .*valid number"),
        (("megatron.optimizer.optimizer=sgd",), 1, r"\[megatron.optimizer\] optimizer = 'sgd' is none of adam"),
        (("megatron.optimizer.use_precision_aware_optimizer=true",), 1, r"\[megatron.optimizer\] OptimizerConfig: "),
        (("megatron.ddp.bucket_size=1.5",), 1, r"\[megatron.ddp\] bucket_size = 1.5: .*valid integer"),
        (("megatron.scheduler.wd_incr_steps=x",), 1, r"\[megatron.scheduler\] wd_incr_steps = 'x': .*valid integer"),
        (("megatron.attention_dropout=0.1",), 1, "attention_dropout = 0.1: it has none"),
        (("megatron.hidden_dropout=0.1", "checkpoint.every=2"), 1, "do not keep random states"),
        (
            ("swap.attention=stock", "megatron.attention_dropout=0.1", "checkpoint.every=2"),
            1,
            "attention_dropout with .* do not keep random states",
        ),
        (("megatron.mtp_num_layers=1",), 1, "mtp_num_layers"),
        (("megatron.ddp.use_megatron_fsdp=true",), 1, "use_megatron_fsdp"),
        (("megatron.sequence_parallel=false", "parallel.tensor=2"), 2, "Megatron needs it for experts"),
        (("megatron.expert_tensor_parallel_size=1", "parallel.tensor=2", "parallel.expert=1"), 2, "drift apart"),
        (("training.steps=4",), 1, r"warmup_steps = 4 must be less than Megatron's 4 steps of decay"),
        (("swap.dispatch=flashmoe", "swap.moe=stock"), 2, r'\[swap\] dispatch = "flashmoe" .* needs moe = "flashmoe"'),
        (
            (*DISPATCH, "megatron.expert_tensor_parallel_size=2", "parallel.tensor=2"),
            4,
            "expert_tensor_parallel_size = 2",
        ),
        ((*DISPATCH, "megatron.moe_token_dispatcher_type=flex"), 2, "it is another exchange"),
        ((*DISPATCH, "megatron.moe_shared_expert_overlap=true", SHARED), 2, "moe_shared_expert_overlap"),
        ((*DISPATCH, "megatron.moe_pad_expert_input_to_capacity=true", FACTOR), 2, "it does not pad experts"),
        ((*DISPATCH, "megatron.delay_wgrad_compute=true", *OVERLAP), 2, "delay_wgrad_compute"),
        (("training.compile=true",), 1, r"\[training\] compile: recipes of Megatron do not have it yet"),
        (("parallel.context=2",), 2, r"\[parallel\] context: recipes of Megatron"),
        (("parallel.replicate=2",), 2, r"\[parallel\] replicate: recipes of Megatron"),
        (("data.document_masks=true",), 1, r"\[data\] document_masks: recipes of Megatron"),
        (("checkpoint.start_from=nowhere",), 1, "start_from = 'nowhere': no such folder"),
        (("parallel.tensor=3",), 3, r"tensor = 3 does not divide \[model\] num_attention_heads \(4\)"),
        (("parallel.pipeline=3",), 3, "pipeline = 3 does not divide the 4 layers"),
        (("parallel.tensor=2",), 3, "tensor 2 × pipeline 1 needs a multiple of 2 processes, found 3"),
        (("parallel.expert=3",), 3, "expert = 3 must divide the 16 experts and the 3 processes"),
        ((), 3, "global_batch_size = 8 cannot be shared by 3"),
        (("data.train=text.csx",), 1, r"\[data\] train = 'text.csx' is neither a file"),
        (("data.tokenizer=nowhere",), 1, r"\[data\] tokenizer = 'nowhere': no such folder"),
        (("model.moe.scoring_func=sigmoid", "model.moe.norm_topk_prob=false"), 1, "divides sigmoid scores"),
        (("model.moe.n_group=4", "model.moe.topk_group=1"), 1, "has to be 2, found 4 / 1"),
    ],
)
def test_what_cannot_be_is_named(overrides: tuple[str, ...], processes: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan(*overrides, processes=processes)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (("lr_decay_style=bogus",), "lr_decay_style = 'bogus' is none of constant, cosine, inverse-square-root, "),
        (("lr_decay_style=WSD",), 'wsd_decay_steps is missing: lr_decay_style = "WSD" needs it'),
        (("lr_decay_style=WSD", "wsd_decay_steps=8"), "lr_wsd_decay_style = None is none of cosine, exponential, "),
        (
            ("lr_decay_style=WSD", "wsd_decay_steps=41", "lr_wsd_decay_style=linear"),
            "wsd_decay_steps = 41: it must be at least 1 and at most 40$",
        ),
        (("min_lr=1.0",), "min_lr = 1.0: it must be at least 0 and at most 0.001$"),
        (("min_lr=-1.0",), "min_lr = -1.0: it must be at least 0 and at most 0.001$"),
        (("max_lr=1.0",), r"max_lr = 1.0 contradicts \[training\] learning_rate, which sets it to 0.001"),
        (("init_lr=1.0",), "init_lr = 1.0: it must be at least 0 and at most 0.001$"),
        (("wd_incr_style=bogus",), "wd_incr_style = 'bogus' is none of constant, cosine, linear$"),
        (("wd_incr_style=linear", "wd_incr_steps=0"), "wd_incr_steps = 0: it must be at least 1$"),
        (("wd_incr_style=linear", "start_wd=0.1"), "end_wd = 0.01: it must be at least 0.1$"),
        (("end_wd=0.1",), "end_wd = 0.1: it must be at least 0.01 and at most 0.01$"),
        (
            ("use_checkpoint_opt_param_scheduler=true", "override_opt_param_scheduler=true"),
            "a resumed run has one schedule, the checkpoint's or its own$",
        ),
    ],
)
def test_schedules_must_fit(overrides: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan(*(f"megatron.scheduler.{override}" for override in overrides))


def test_the_parameters_rates_are_the_schedules() -> None:
    """Groups of parameters have rates of their own, the optimizer's, which Megatron's schedule goes by."""
    for table in ("optimizer", "scheduler"):
        found = plan(f"megatron.{table}.min_lr=1e-5")
        assert found.scheduler["min_lr"] == found.optimizer.min_lr == 1e-5
    with pytest.raises(UsageError, match=r"\[megatron.optimizer\] min_lr = 1.0: it must be at least 0 and at most"):
        plan("megatron.optimizer.min_lr=1.0")
    with pytest.raises(UsageError, match=r"min_lr = 1e-05 contradicts \[megatron.optimizer\] min_lr, .* to 1e-06"):
        plan("megatron.scheduler.min_lr=1e-5", "megatron.optimizer.min_lr=1e-6")
    assert plan("megatron.window_size=[8, 0]").config.window_size == (8, 0)


_LATENT = "deepseek_v3_debug"


@pytest.mark.parametrize(
    "config, overrides, processes, text",
    [
        ("llama3_debug", ("model.vocab_size=513",), 2, r"tensor = 2 does not divide \[model\] vocab_size \(513\)"),
        ("llama3_debug", ("model.intermediate_size=97",), 2, r"2 does not divide \[model\] intermediate_size \(97\)"),
        ("llama3_debug", ("training.seq_len=33",), 2, r"2 does not divide \[training\] seq_len \(33\)"),
        (
            "llama3_debug",
            ("model.num_attention_heads=6", "model.num_key_value_heads=3", "model.head_dim=64"),
            2,
            r"tensor = 2 neither divides nor is a multiple of \[model\] num_key_value_heads \(3\)",
        ),
        (
            "qwen3_moe_debug",
            ("model.moe.moe_intermediate_size=97",),
            2,
            r"2 does not divide \[model.moe\] moe_intermediate_size \(97\)",
        ),
        (
            "qwen3_moe_debug",
            ("parallel.expert=2", "megatron.expert_tensor_parallel_size=2"),
            2,
            r"expert = 2 × \[megatron\] expert_tensor_parallel_size = 2 must divide the 2 processes",
        ),
        (_LATENT, ("model.intermediate_size=97",), 2, r"2 does not divide \[model\] intermediate_size \(97\)"),
        (
            _LATENT,
            ("parallel.expert=2", "model.moe.n_shared_experts=1", "model.moe.moe_intermediate_size=97"),
            2,
            r"2 does not divide the width of shared experts \(97\)",
        ),
        (_LATENT, ("model.mla.kv_lora_rank=33",), 2, r"2 does not divide \[model.mla\] kv_lora_rank \+ .* \(97\)"),
        (_LATENT, ("model.mla.q_lora_rank=33",), 2, r"2 does not divide \[model.mla\] q_lora_rank \(33\)"),
    ],
)
def test_sizes_that_tensor_parallelism_cannot_cut(
    config: str, overrides: tuple[str, ...], processes: int, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.toml"
    training = "[training]\nsteps = 1\nseq_len = 32\nlearning_rate = 1e-3\n"
    path.write_text(f'framework = "megatron"\nconfig = "{config}"\n{training}[parallel]\ntensor = 2\n')
    plan(processes=processes, name=str(path))
    with pytest.raises(UsageError, match=text):
        plan(*overrides, processes=processes, name=str(path))


def test_errors_of_every_kind_are_megatrons(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    training = "[training]\nsteps = 1\nseq_len = 32\nlearning_rate = 1e-3\n"
    path.write_text(f'framework = "megatron"\nconfig = "{_LATENT}"\n{training}')
    with pytest.raises(UsageError, match=r"\[megatron\] MLATransformerConfig: Output gate is not supported"):
        plan("megatron.attention_output_gate=true", name=str(path))


def test_sizes_that_nothing_cuts() -> None:
    odd = ("model.intermediate_size=97", "model.hidden_size=257")  # no layer is dense; tokens are cut, not their dim
    plan("parallel.tensor=2", *odd, processes=2)
    plan("parallel.tensor=2", "parallel.expert=2", "model.moe.moe_intermediate_size=97", processes=2)
    plan("parallel.tensor=4", "model.num_key_value_heads=2", processes=4)


def test_stock_latent_attention_is_impossible(tmp_path: Path) -> None:
    text = 'framework = "megatron"\nconfig = "deepseek_v3_debug"\n[swap]\nattention = "stock"\n'
    (tmp_path / "a.toml").write_text(text + "[training]\nsteps = 1\nseq_len = 8\nlearning_rate = 1e-3\n")
    with pytest.raises(UsageError, match="Megatron has latent attention with TransformerEngine only"):
        plan(name=str(tmp_path / "a.toml"))


@pytest.mark.parametrize("key", ["steps", "seq_len", "learning_rate"])
def test_what_megatron_has_no_default_for(key: str, tmp_path: Path) -> None:
    lines = {"steps": "steps = 1", "seq_len": "seq_len = 8", "learning_rate": "learning_rate = 1e-3"}
    said = "\n".join(line for name, line in lines.items() if name != key)
    (tmp_path / "a.toml").write_text(f'framework = "megatron"\nconfig = "llama3_debug"\n[training]\n{said}\n')
    with pytest.raises(UsageError, match=rf"\[training\] {key} is missing: Megatron has no default"):
        plan(name=str(tmp_path / "a.toml"))


def test_tables_of_another_framework() -> None:
    with pytest.raises(UsageError, match=r"\[torchtitan\] is of another framework than the recipe's, 'megatron'"):
        plan("torchtitan.metrics.log_freq=1")


def test_a_kernel_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmoe_train.integrations import sizes

    recipes.check_kernels(plan())
    monkeypatch.setattr(sizes, "capability", lambda device, index=None: "9.0")
    monkeypatch.setattr(sizes, "_device", lambda: "cuda")
    with pytest.raises(UsageError, match="--allow-fallback trains on PyTorch's kernels"):
        recipes.check_kernels(plan())
