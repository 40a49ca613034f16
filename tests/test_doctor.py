"""What `flashmoe doctor` finds, and what it makes of it."""

import importlib.metadata
import importlib.util

import pytest
import torch
from rich.console import Console

from flashmoe_train import doctor
from flashmoe_train.doctor import Finding


def found(subject: str) -> list[Finding]:
    return [finding for finding in doctor.examine() if finding.subject == subject]


def test_this_machine_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.report(Console(width=120))
    text = capsys.readouterr().out
    for part in ("Python", torch.__version__, "torchtitan", "attention 192/128", "mixture of experts"):
        assert part in text


def test_a_missing_framework_is_a_problem_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not doctor.report(Console(width=200))
    assert "not installed: pip install 'flashmoe-train[torchtitan]' (tested: 0.2.2 with" in capsys.readouterr().out


def test_one_framework_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "megatron" else find(name))
    (finding,) = found("megatron-core")
    assert finding.state == "note" and "pip install 'flashmoe-train[megatron]'" in finding.text


@pytest.mark.parametrize(
    "version, torch_version, state",
    [
        ("0.2.2", "2.13.0+cpu", "ok"),
        ("0.2.2", "2.11.0", "ok"),
        ("0.2.2", "2.12.1", "note"),
        ("0.3.0", "2.14.1", "ok"),
        ("0.3.0", "2.15.0", "note"),
        ("0.3.0", "2.13.0", "problem"),
        ("0.4.0", "2.14.1", "problem"),
    ],
)
def test_versions(version: str, torch_version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(torch, "__version__", torch_version)
    assert found("torchtitan")[0].state == state


def test_broken_pairs_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert any("expert parallelism + selective op checkpointing is refused" in f.text for f in found("torchtitan"))


def test_a_generation_is_not_told_of_the_others_broken_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.0")
    (finding,) = found("torchtitan")
    assert finding.text.startswith("0.3.0 needs torch 2.14 or later (tested: ")


def test_a_missing_library_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CUDA_LIBRARY", doctor.CUDA_LIBRARY.with_name("nothing.so"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CUDACXX", raising=False)
    (library,) = found("CUDA library")
    assert library.state == "note" and "install a CUDA toolkit" in library.text
    monkeypatch.setenv("CUDACXX", "nvcc")
    assert "reinstall flashmoe_train to build it" in found("CUDA library")[0].text


@pytest.mark.parametrize(
    "capability, state, text",
    [((8, 0), "note", "PyTorch's kernels: this"), ((9, 0), "problem", "`flashmoe train` asks for --allow-fallback")],
)
def test_operators_without_kernels(
    capability: tuple[int, int], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for operator in ("attention", "moe"):
        monkeypatch.setattr(f"flashmoe_train.ops.{operator}.has_kernel", lambda *_: False)
    (attention,) = found("attention 128/128")
    assert attention.state == state and text in attention.text and "has no compiled attention" in attention.text


def test_layouts_that_are_copied_are_named_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not found("attention layouts")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("flashmoe_train.ops.attention.has_kernel", lambda *_: True)
    (layouts,) = found("attention layouts")
    assert layouts.state == "ok" and "no multiple of 16 bytes" in layouts.text and "copies(q, k, v)" in layouts.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert not found("attention layouts")
