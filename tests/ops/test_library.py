"""What holds for the operators of all families."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashmoe_train import attention, moe, ops
from flashmoe_train.ops import library
from flashmoe_train.ops.moe import moe_combine, moe_permute, moe_rows, route_plan, router_topk
from flashmoe_train.ops.moe.glu import moe_glu

IDS = torch.arange(6, dtype=torch.int32).view(3, 2)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)

_MOE: tuple[Callable[..., Tensor], list[tuple[int, ...]]] = (
    lambda x, w1, w2, w3, weights: moe(x, w1, w2, w3, IDS, weights),
    [(3, 8), (6, 4, 8), (6, 8, 4), (6, 4, 8), (3, 2)],
)

# What runs the operator that computes a gradient: (function, shapes of its inputs).
GRADIENTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "attention_backward": (attention, [(1, 4, 2, 8)] * 3),
    "moe_down_backward": _MOE,
    "moe_up_backward": _MOE,
    "moe_combine_backward": (lambda rows, weights: moe_combine(rows, IDS.to(rows.device), weights), [(6, 8), (3, 2)]),
    "moe_glu_backward": (
        lambda gate, up, weight: moe_glu(gate, up, torch.tensor([0, 6], dtype=torch.int32, device=gate.device), weight),
        [(6, 8), (6, 8), (6,)],
    ),
    "router_topk_backward": (lambda logits: router_topk(logits, 2).weights, [(3, 6)]),
}


def test_every_gradient_is_listed() -> None:
    ops.load_all()
    operators = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("flashmoe::")}
    assert {name.removeprefix("flashmoe::") for name in operators if name.endswith("_backward")} == set(GRADIENTS)


@pytest.mark.parametrize(
    "device, op",
    [
        *(("cpu", op) for op in GRADIENTS),
        pytest.param("cuda", "moe_combine_backward", marks=pytest.mark.gpu),
        pytest.param("cuda", "moe_glu_backward", marks=pytest.mark.gpu),
        pytest.param("cuda", "router_topk_backward", marks=pytest.mark.gpu),
    ],
)
def test_differentiable_once(device: str, op: str) -> None:
    """A second gradient is an error that names the operator: neither silently nothing nor what a reference records.
    Where several operators compute the gradients, that of each is refused by the one that it is from."""
    function, shapes = GRADIENTS[op]
    inputs = [torch.rand(shape, device=device, requires_grad=True) for shape in shapes]
    loss = function(*inputs).square().sum()
    wanted = torch.autograd.grad(loss, inputs, retain_graph=True)
    found = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    refused = set()
    for gradient in found:
        with pytest.raises(NotImplementedError, match="has no gradient") as error:
            gradient.sum().backward(retain_graph=True)
        refused.add(str(error.value).split()[0])
    assert f"flashmoe::{op}" in refused


FORWARD = GRADIENTS | {
    "moe_permute": (lambda x: moe_permute(x, *route_plan(IDS, 6)[1:]), [(3, 8)]),
    "moe_rows": (lambda rows, *w: moe_rows(rows, *w, OFFSETS), [(6, 8), (2, 4, 8), (2, 8, 4), (2, 4, 8)]),
}


@pytest.mark.parametrize("op", FORWARD)
def test_no_derivative_in_forward_mode(op: str) -> None:
    """PyTorch would say that it is zero."""
    function, shapes = FORWARD[op]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
        torch.func.jvp(function, inputs, inputs)
    assert function(*inputs).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", ["moe", "moe_combine", "moe_glu", "moe_permute", "router_topk"])
def test_no_tokens(op: str, device: str) -> None:
    """The gradient of a sum is expanded: without an element it has no contiguous dimension."""
    ids = torch.empty(0, 2, dtype=torch.int32, device=device)
    empty = lambda *size: torch.empty(size, device=device, requires_grad=True)  # noqa: E731
    w = [torch.randn(size, device=device) for size in ((6, 4, 8), (6, 8, 4), (6, 4, 8))]
    plan = route_plan(ids, 6)
    function = {
        "moe": lambda x, weights: moe(x, *w, ids, weights),
        "moe_combine": lambda rows, weights: moe_combine(rows, ids, weights),
        "moe_glu": lambda x, _: moe_glu(x[:, :4], x[:, 4:], plan.offsets, None),
        "moe_permute": lambda x, _: moe_permute(x, plan.row_slot, plan.slot_row),
        "router_topk": lambda logits, _: router_topk(logits, 2).weights,
    }[op]
    x, weights = empty(0, 8), empty(0, 2)
    out = function(x, weights)
    out.sum().backward()
    assert x.grad.shape == x.shape and out.shape[0] == 0


def test_compiled_code_of_other_sources_is_not_used(tmp_path: Path) -> None:
    source = tmp_path / "below" / "operator.py"
    source.parent.mkdir()
    source.write_text("a")
    before = library.sources_digest(tmp_path)
    source.write_text("b")
    assert library.sources_digest(tmp_path) != before
    assert library.sources_digest(Path(library.__file__).parent) in torch.compiler.config.cache_key_tag
