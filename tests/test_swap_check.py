"""`flashmoe swap-check` from end to end: what it prints, what it refuses, and that it finds a wrong swap."""

import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flashmoe_train.cli import app
from flashmoe_train.integrations.transformers import experts
from flashmoe_train.integrations.transformers.families import FAMILIES


def swap_check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["swap-check", *arguments])


PLAIN = """
import torch
from torch import nn

def model():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)

def inputs():
    return {"src": torch.randn(2, 5, 16)}
"""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.attention_why_not is None])
def test_families(family) -> None:
    result = swap_check(family.model_type)
    assert result.exit_code == 0, result.output
    assert family.attention in result.stdout and 'attn_implementation="flashmoe"' in result.stdout
    assert "outputs    equal: 1 compared (cpu, float32)" in result.stdout and "gradients  equal" in result.stdout


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    result = swap_check(str(tmp_path / "plain.py"))
    assert result.exit_code == 0, result.output
    for text in ("FlashMoETransformerEncoderLayer", "outputs    equal", "gradients  equal"):
        assert text in result.stdout


def test_a_file_with_a_transformers_model(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from flashmoe_train.integrations.transformers import small\ndef model(): return small.build('olmoe')\n"
    )
    result = swap_check(str(tmp_path / "own.py"))
    assert result.exit_code == 0 and "OlmoeExperts" in result.stdout, result.output


def test_what_goes_back_is_said(tmp_path: Path) -> None:
    """Here a mask that PyTorch computes."""
    (tmp_path / "masked.py").write_text(PLAIN.replace("5, 16)}", '5, 16), "mask": torch.rand(5, 5)}'))
    result = swap_check(str(tmp_path / "masked.py"))
    assert result.exit_code == 0 and "note: MultiheadAttention is computed by PyTorch: attn_mask" in result.stdout


def test_a_wrong_swap_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = experts.moe
    monkeypatch.setattr(experts, "moe", lambda x, *others: stock(x, *others) * 1.001)
    result = swap_check("mixtral")
    assert result.exit_code == 1
    assert "outputs    differ" in result.stdout and "gradients  differ" in result.stdout


@pytest.mark.parametrize(
    "name, text",
    [
        ("qwen3_moo", "did you mean 'qwen3_moe'?"),
        ("gpt-oss", "nothing was swapped in GptOssForCausalLM: GptOssAttention: it has attention sinks"),
        ("missing.py", "missing.py is no file"),
        ("empty.py", "empty.py must define model()"),
        ("number.py", "must return a torch.nn.Module, found int"),
        ("alone.py", "alone.py must define inputs()"),
        ("list.py", "must return a tuple or a dictionary, found list"),
    ],
)
def test_mistakes(name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("")
    Path("number.py").write_text("def model(): return 3")
    Path("alone.py").write_text(PLAIN.replace("inputs", "others"))
    Path("list.py").write_text(PLAIN.replace("return {", "return [").replace("16)}", "16)]").replace('"src": ', ""))
    result = swap_check(name)
    assert result.exit_code == 2 and text in result.stderr and "Traceback" not in result.output


def test_families_need_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("flashmoe_train.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["flashmoe_train.integrations"], "transformers", None)
    monkeypatch.delattr("flashmoe_train.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = swap_check("llama")
    assert result.exit_code == 2 and "Transformers cannot be imported" in result.stderr
