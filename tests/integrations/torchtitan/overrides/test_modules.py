"""Overridden modules compute what stock computes: documents as flex attention, dispatch and experts as TorchTitan's."""

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import ConfigManager, apply_overrides
from torchtitan.models.common.attention import (
    FlexAttention,
    VarlenAttention,
    VarlenMetadata,
    create_varlen_metadata_for_document,
)
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, HybridEPTokenDispatcher

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.torchtitan import overrides
from flashmoe_train.integrations.torchtitan.overrides import documents

from ....ops.operators import CountOperators
from .test_parity import unrounded

HERE = "flashmoe_train.integrations.torchtitan.overrides"
B, L, N, G, D = 2, 40, 4, 2, 16


def positions_of(*rows: list[int]) -> torch.Tensor:
    """Positions of rows that are cut into documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


PACKED = positions_of([7, 1, 20, 12], [40])


@pytest.mark.parametrize("value_dim", [D, 8])
def test_attention_equals_flex_attention_on_packed_documents(value_dim: int) -> None:
    q, k, v = torch.randn(B, L, N, D), torch.randn(B, L, G, D), torch.randn(B, L, G, value_dim)
    document = (PACKED == 0).cumsum(1)

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= j) & (document[b, i] == document[b, j])

    block_mask = create_block_mask(mask, B, None, L, L, device="cpu")
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    wanted = flex_attention(*swapped, block_mask=block_mask, scale=0.2, enable_gqa=True).transpose(1, 2)
    attention = overrides.flex_attention(FlexAttention.Config()).build()
    found = attention(q, k, v, attention_masks=documents.metadata(PACKED), scale=0.2, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_attention_takes_no_other_masks() -> None:
    attention = overrides.varlen_attention(VarlenAttention.Config()).build()
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(TypeError, match="attention_masks must be VarlenMetadata, found NoneType"):
        attention(q, q, q, attention_masks=None)
    with pytest.raises(NotImplementedError, match="no logsumexp, which out_transform asks for"):
        attention(q, q, q, attention_masks=documents.metadata(torch.arange(4)[None]), out_transform=max)
    with pytest.raises(UsageError, match=r"causal, window_size \(-1, 0\); found \(16, 0\)"):
        overrides.varlen_attention(VarlenAttention.Config(window_size=(16, 0)))


def test_bounds_are_torchtitans_and_empty_documents() -> None:
    theirs = create_varlen_metadata_for_document(PACKED).cu_seq_q
    ours = documents.metadata(PACKED)
    assert ours.cu_seq_q.dtype == torch.int32 and ours.cu_seq_q.tolist()[: len(theirs)] == theirs.tolist()
    assert set(ours.cu_seq_q.tolist()[len(theirs) :]) == {B * L}
    assert documents.bounds(torch.zeros(B, L, dtype=torch.long)).tolist() == list(range(B * L + 1))
    continued = positions_of([10, 30], [40]) + 5  # rows begin in the middle of a document
    assert documents.bounds(continued).tolist()[:3] == [0, L, B * L]


def test_bounds_have_one_shape_and_one_compilation() -> None:
    attention = overrides.flex_attention(FlexAttention.Config()).build()

    def run(positions: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return attention(q, q, q, attention_masks=documents.metadata(positions))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q = torch.randn(B, L, N, D)
    for i, positions in enumerate((PACKED, positions_of([1] * 40, [3, 37]), positions_of([40], [40]))):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(positions, q), run(positions, q))
    shapes = {(x.cu_seq_q.shape, x.max_q) for x in map(documents.metadata, (PACKED, positions_of([40], [40])))}
    assert shapes == {((B * L + 1,), L)}


class NoWaiting(TorchDispatchMode):
    """On a GPU these make the host wait for the device, or shapes depend on what is on it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "repeat_interleave", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.REFUSED, func
        return func(*args, **(kwargs or {}))


def block(experts: int = 8, top_k: int = 3) -> RoutedExperts.Config:
    return RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=16, hidden_dim=24, num_experts=experts),
        token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=experts, top_k=top_k),
    )


def run(config: RoutedExperts.Config) -> list[torch.Tensor]:
    torch.manual_seed(3)
    module = config.build()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 11, 16, requires_grad=True)
    scores = torch.rand(2, 11, 3, requires_grad=True)
    ids = torch.rand(2, 11, 7).topk(3).indices  # the last of the experts gets nothing
    counts = torch.zeros(8, dtype=torch.long).scatter_add(0, ids.flatten(), torch.ones(66, dtype=torch.long))
    with NoWaiting():
        out = module(x, scores, ids, counts)
        grads = torch.autograd.grad(out.square().sum(), (x, scores, *module.parameters()))
    return [out.detach(), *grads]


@pytest.mark.parametrize("part", ["routed_experts", "dispatcher"])
def test_dispatch_and_experts_equal_stock_without_waiting(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = block()
    if part == "routed_experts":
        ours = overrides.routed_experts(config)
    else:
        ours = dataclasses.replace(config, token_dispatcher=overrides.dispatcher(config.token_dispatcher))
    with CountOperators() as counter:
        if part == "dispatcher":
            monkeypatch.setattr(GroupedExperts, "forward", waits_not)
        found = run(ours)
    used = {"routed_experts": "moe_forward", "dispatcher": "moe_combine"}[part]
    assert counter.counts[used] >= 1
    monkeypatch.setattr(GroupedExperts, "forward", waits_not)
    for mine, theirs in zip(found, run(config), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def waits_not(experts: GroupedExperts, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Stock's experts, unrounded, whatever the host has to wait for in this stand-in."""
    with torch.utils._python_dispatch._disable_current_modes():
        return unrounded(experts, x, counts)


def test_what_has_another_class_is_refused() -> None:
    config = block()
    hybrid = HybridEPTokenDispatcher.Config(num_experts=8, top_k=3)
    with pytest.raises(UsageError, match=r"local and all-to-all dispatchers, found HybridEPTokenDispatcher\.Config"):
        overrides.routed_experts(dataclasses.replace(config, token_dispatcher=hybrid))

    class Others(GroupedExperts):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

    others = Others.Config(dim=16, hidden_dim=24, num_experts=8)
    with pytest.raises(UsageError, match=r"takes the place of GroupedExperts alone, found .*Others\.Config"):
        overrides.routed_experts(dataclasses.replace(config, inner_experts=others))


@pytest.mark.parametrize("module, config", [("deepseek_v3", "deepseek_v3_debugmodel"), ("llama3", "llama3_debugmodel")])
def test_one_line_on_torchtitans_own_command_line(module: str, config: str) -> None:
    names = ("flex_attention", "routed_experts", "checkpointing")
    line = ",".join(f"{HERE}.{name}" for name in names)
    parsed = ConfigManager().parse_args(["--module", module, "--config", config, "--override.imports", line])
    before = list(parsed.model_spec.model.build().state_dict())
    replaced = apply_overrides(parsed.override, parsed)
    with torch.device("meta"):
        model = parsed.model_spec.model.build()
    assert list(model.state_dict()) == before
    found = {type(m).__name__ for m in model.modules()}
    assert "FlashMoEAttention" in found and "FlexAttention" not in found
    assert ("FlashMoERoutedExperts" in found) == (module == "deepseek_v3")
    assert any("FlashMoESelectiveAC" in line for line in replaced)
    masks = model.get_attention_masks(positions=PACKED)
    assert isinstance(masks, VarlenMetadata) and masks.cu_seq_q.shape == (B * L + 1,)
