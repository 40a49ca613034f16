"""Swapping classes of modules: what is replaced, what is left alone and why."""

import pytest
import torch
from torch import Tensor, nn

import flashmoe_train
from flashmoe_train.errors import UsageError
from flashmoe_train.integrations import pytorch  # noqa: F401  (its swaps are registered once, not in a test's own dict)
from flashmoe_train.swap import Row, Swap, swap_modules


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wide(module: nn.Module) -> str | None:
    return "too wide" if module.out_features > 4 else None


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8)))


def test_swaps_matching_modules_in_place() -> None:
    net = model()
    before, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(3, 4)
    wanted = 2 * net[0](x)
    report = swap_modules(net, [Swap(nn.Linear, Doubled, wide)])
    assert report.rows == [
        Row("0", "Linear", "Doubled", ""),
        Row("2.0", "Linear", "Doubled", ""),
        Row("2.1", "Linear", None, "too wide"),
    ]
    assert report.summary() == [
        ("*", "Linear", "Doubled", 1),
        ("*.*", "Linear", "Doubled", 1),
        ("*.*", "Linear", "left alone: too wide", 1),
    ]
    torch.testing.assert_close(net[0](x), wanted)
    assert net.state_dict().keys() == before.keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_revert() -> None:
    net = model()
    swap_modules(net, [Swap(nn.Linear, Doubled)]).revert()
    assert {type(m) for m in net.modules()} == {nn.Sequential, nn.Linear, nn.ReLU}


def test_what_was_wrapped_since_is_not_reverted() -> None:
    net = model()
    report = swap_modules(net, [Swap(nn.Linear, Doubled)])
    net[0].__class__ = type("Wrapped", (Doubled,), {})
    with pytest.raises(UsageError, match="cannot revert: a Linear has become Wrapped since"):
        report.revert()
    assert type(net[2][0]) is Doubled


def test_subclasses_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    derived = net[1].__class__ = type("Derived", (nn.Linear,), {})
    assert swap_modules(net, [Swap(nn.Linear, Doubled)]).summary() == [
        ("*", "Linear", "Doubled", 1),
        ("*", "Derived", "left alone: a class derived from what is swapped", 1),
    ]
    assert type(net[1]) is derived


def test_swapping_twice_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    swap_modules(net, [Swap(nn.Linear, Doubled)])
    with pytest.raises(UsageError, match="Doubled: swapped already"):
        swap_modules(net, [Swap(nn.Linear, Doubled)], optional=True)


def test_nothing_swapped_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing was swapped in Sequential: it has no Linear"):
        swap_modules(nn.Sequential(nn.ReLU()), [Swap(nn.Linear, Doubled)])
    with pytest.raises(UsageError, match="nothing was swapped in Sequential: Linear: too wide"):
        swap_modules(nn.Sequential(nn.Linear(4, 8)), [Swap(nn.Linear, Doubled, wide)])


def test_mistakes_of_callers_are_named() -> None:
    for model, choices, text in (
        (None, {}, "model must be a torch.nn.Module, found None"),
        (nn.MultiheadAttention, {}, "model must be a torch.nn.Module, found <class"),
        (nn.Sequential(), {"attention": "stock", "experts": "stock"}, "there is nothing to swap"),
    ):
        with pytest.raises(UsageError, match=text):
            flashmoe_train.swap(model, **choices)
    with pytest.raises(ValueError, match="part must be one of 'attention', 'experts' or None, found 'atention'"):
        flashmoe_train.swap.register(nn.Linear, part="atention")


def test_optional_swap_accepts_a_model_without_such_modules_only() -> None:
    swap = Swap(nn.Linear, Doubled, wide)
    assert swap_modules(nn.Sequential(nn.ReLU()), [swap], optional=True).rows == []
    with pytest.raises(UsageError, match="Linear: too wide"):
        swap_modules(nn.Sequential(nn.Linear(4, 8)), [swap], optional=True)


def test_reports_add_up() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = swap_modules(net, [Swap(nn.Linear, Doubled)])
    report += swap_modules(net, [Swap(nn.ReLU, type("Clipped", (nn.ReLU,), {}))])
    assert [row.became for row in report.rows] == ["Doubled", "Clipped"]
    report.revert()
    assert [type(m) for m in net] == [nn.Linear, nn.ReLU]


def test_replacement_must_be_a_subclass() -> None:
    with pytest.raises(TypeError, match="ReLU must be a subclass of Linear"):
        Swap(nn.Linear, nn.ReLU)


def test_dry_run_changes_nothing() -> None:
    net = model()
    report = swap_modules(net, [Swap(nn.Linear, Doubled, wide)], dry_run=True)
    assert [row.became for row in report.rows] == ["Doubled", "Doubled", None]
    assert not any(type(m) is Doubled for m in net.modules())
    assert "What would be swapped" in str(report)
    report.revert()


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Linear):
        pass

    monkeypatch.setattr(flashmoe_train.swap, "_swaps", {})

    @flashmoe_train.swap.register(Mine, wide)
    class Faster(Mine):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(Mine(4, 4), Mine(4, 8), nn.Linear(8, 8))
    report = flashmoe_train.swap(net)
    assert [type(m) for m in net] == [Faster, Mine, nn.Linear]
    for part in ("What was swapped", "Mine", "Faster", "left alone: too wide"):
        assert part in str(report)
    report.revert()
    assert [type(m) for m in net] == [Mine, Mine, nn.Linear] and "nothing" in str(report)
    with pytest.raises(TypeError, match="ReLU must be a subclass of Mine"):
        flashmoe_train.swap.register(Mine)(nn.ReLU)


def test_parts() -> None:
    """A class says what it is; `swap` is told what to leave alone."""
    net = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(UsageError, match="nothing was swapped in Sequential"):
        flashmoe_train.swap(net, attention="stock")
    assert flashmoe_train.swap(net, experts="stock").rows[0].became == "FlashMoEMultiheadAttention"
    with pytest.raises(UsageError, match="experts must be one of 'flashmoe', 'stock', found 'no'"):
        flashmoe_train.swap(net, experts="no")  # type: ignore[arg-type]


def test_a_dry_run_of_nothing_is_a_report() -> None:
    report = flashmoe_train.swap(nn.Sequential(nn.ReLU()), dry_run=True)
    assert report.nothing() and "nothing" in str(report)
