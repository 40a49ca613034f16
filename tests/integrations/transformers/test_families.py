"""Every family that Transformers' swap names: logits and gradients as stock's, on every kind of mask."""

import subprocess
import sys

import pytest
import torch

import flashmoe_train
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.transformers.families import FAMILIES

from ...ops.operators import Copied
from .models import ROUTED, SUPPORTED, Calls, build, calls, check_equal, inputs, no_stock, outcome

assert calls  # a fixture

CASES = ["plain", "left", "right", "both", "packed"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_equals_stock(model_type: str, case: str, calls: Calls) -> None:
    model, given = build(model_type), inputs(case)
    wanted = outcome(model, given)
    report = flashmoe_train.swap(model)
    assert all(row.became for row in report.rows)
    with no_stock():
        found = outcome(model, given)
    layers = model.config.num_hidden_layers
    kinds = [name for name, _ in calls]
    routed = layers - (model_type == "deepseek_v3") if model_type in ROUTED else 0
    assert kinds.count("attention") == layers and kinds.count("moe") == routed
    check_equal(found, wanted)


@pytest.mark.parametrize("case", ["plain", "left"])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_attention_kernel_reads_in_place(model_type: str, case: str, calls: Calls) -> None:
    """What layers pass; packing is a view of it, but for DeepSeek-V3's layout."""
    model = build(model_type).to(torch.bfloat16)
    flashmoe_train.swap(model)
    with Copied() as copied, CountCopies() as clones:
        model(**inputs(case))
    assert copied.calls == [{}, {}]
    assert clones.found == (4 if (model_type, case) == ("deepseek_v3", "left") else 0)  # q and k of two layers


class CountCopies(torch.overrides.TorchFunctionMode):
    """Of reshapes, those that had to copy."""

    found = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func is torch.Tensor.reshape and args[1] == 1:  # in attention_forward alone
            self.found += result.data_ptr() != args[0].data_ptr()
        return result


@pytest.mark.parametrize("case", ["plain", "left", "packed"])
def test_each_case_needs_its_mask(case: str) -> None:
    """Or a comparison above could not fail: without window, padding or documents results are others. (Padding on the
    right alone is what causal attention does not see anyway.)"""
    model, given = build("mistral"), inputs(case)
    wanted = outcome(model, given)["logits"]
    if case == "plain":
        model.config.sliding_window = None
    changed = model(input_ids=given["input_ids"]).logits
    changed = changed[given["attention_mask"].bool()] if "attention_mask" in given else changed.flatten(0, 1)
    assert (changed - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_gpt_oss_is_left_alone_and_says_why() -> None:
    model = build("gpt_oss")
    with pytest.raises(UsageError, match=r"GptOssAttention: it has attention sinks.*GptOssExperts: .* biases"):
        flashmoe_train.swap(model)
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    report = flashmoe_train.swap(model, dry_run=True)
    assert len(report.rows) == 4 and report.nothing()


def test_other_attention_is_left_alone_and_says_why() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match=r"GPT2Attention: there is no adapter for GPT2Attention; there are"):
        flashmoe_train.swap(model)


def test_experts_alone_of_a_family_without_adapter() -> None:
    """Their interface says what they compute, whoever they are."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=16, use_cache=False)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(config)
    wanted = outcome(model, inputs("plain"))
    left, swapped = flashmoe_train.swap(model).summary()
    assert "no adapter for Qwen2MoeAttention" in left[2] and swapped[2] == 'experts_implementation="flashmoe"'
    check_equal(outcome(model, inputs("plain")), wanted)


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("llama", {"attention_dropout": 0.1}, "LlamaAttention: its attention dropout is 0.1"),
        ("mixtral", {"attention_dropout": 0.1, "hidden_act": "gelu"}, "MixtralExperts: its activation is GELU"),
    ],
)
def test_what_our_operators_lack_is_left_alone(model_type: str, changes: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=f"nothing was swapped in .*{reason}"):
        flashmoe_train.swap(build(model_type, **changes))


def test_parts_can_be_chosen() -> None:
    model = build("qwen3_moe")
    flashmoe_train.swap(model, attention="stock")
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "flashmoe")
    flashmoe_train.swap(model, experts="stock")
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("flashmoe", "flashmoe")
    with pytest.raises(UsageError, match="Qwen3MoeAttention: swapped already"):
        flashmoe_train.swap(model)


def test_dry_run_and_revert() -> None:
    model = build("qwen3_moe")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    planned = flashmoe_train.swap(model, dry_run=True)
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    assert "What would be swapped" in str(planned)
    report = flashmoe_train.swap(model)
    assert report.rows == planned.rows
    assert report.summary() == [
        ("model.layers.*.self_attn", "Qwen3MoeAttention", 'attn_implementation="flashmoe"', 2),
        ("model.layers.*.mlp.experts", "Qwen3MoeExperts", 'experts_implementation="flashmoe"', 2),
    ]
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    report.revert()
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"


_WITHOUT_US = """
import sys
import torch
from transformers import AutoModelForCausalLM

sys.modules["flashmoe_train"] = None  # an import of it would fail
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save({"logits": model(**torch.load(f"{sys.argv[1]}/given.pt")).logits}, f"{sys.argv[1]}/found.pt")
"""


def test_what_is_saved_knows_nothing_of_us(tmp_path) -> None:
    """In the files; and a process without the library reads them."""
    model, given = build("qwen3_moe"), inputs("plain")
    flashmoe_train.swap(model)
    model.save_pretrained(tmp_path)
    assert "flashmoe" not in (tmp_path / "config.json").read_text()
    torch.save(given, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", _WITHOUT_US, str(tmp_path)], check=True)
    check_equal(torch.load(tmp_path / "found.pt"), {"logits": model(**given).logits})


def test_a_model_inside_of_another() -> None:
    """The swap finds configurations by the modules that hold them."""
    outer = torch.nn.ModuleDict({"first": build("llama"), "second": build("mixtral")})
    report = flashmoe_train.swap(outer)
    assert {row.name.split(".")[0] for row in report.rows} == {"first", "second"}
    assert all(model.config._attn_implementation == "flashmoe" for model in outer.values())


def test_what_a_configuration_holds_is_not_set_with_it() -> None:
    """A vision tower's configuration beside the language model's."""
    from transformers import LlavaConfig

    from flashmoe_train.integrations import transformers as integration

    config = LlavaConfig(attn_implementation="eager")
    undo = integration._assign(config, "_attn_implementation")
    assert config._attn_implementation == "flashmoe"
    assert config.vision_config._attn_implementation == config.text_config._attn_implementation == "eager"
    undo()
    assert config._attn_implementation == "eager"


def test_swap_needs_no_transformers() -> None:
    import subprocess
    import sys

    program = (
        "import sys; sys.modules['transformers'] = None; import torch, flashmoe_train;"
        "print(flashmoe_train.swap(torch.nn.MultiheadAttention(8, 2)).rows[0].became)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "FlashMoEMultiheadAttention"


def test_families_are_told_apart() -> None:
    assert len({family.model_type for family in FAMILIES}) == len(FAMILIES) == 8
