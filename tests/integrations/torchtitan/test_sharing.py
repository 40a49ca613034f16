"""Steps whose exchange had no room for all rows are skipped by all processes, and reported with layer and key."""

import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW, Optimizer

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.exchanges import MOST_SKIPPED, Sharing, forget
from flashmoe_train.integrations.torchtitan.sharing import Overflows
from flashmoe_train.ops.expert_parallel import routed_experts

from ... import processes

D, N, K, E, TOKENS = 8, 4, 2, 4, 6


class Optimizers(Optimizer):
    """Of several optimizers, as TorchTitan's."""

    def __init__(self, parameters: list, **options: bool) -> None:
        self.inner = [AdamW([p], lr=0.1, weight_decay=0.1, **options) for p in parameters]
        super().__init__(parameters, {})

    def step(self) -> None:  # type: ignore[override]
        for optimizer in self.inner:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.inner:
            optimizer.zero_grad(set_to_none)


def check(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    shared = Sharing(TOKENS, capacity=1.0, timeout=60.0)
    exchange = shared.exchange(dist.group.WORLD, E, D, K, torch.float32, torch.device("cpu"))
    assert shared.exchange(dist.group.WORLD, E, D, K, torch.float32, torch.device("cpu")) is exchange
    parameters = [torch.nn.Parameter(torch.randn(s)) for s in ((2, N, D), (2, D, N), (2, N, D))]
    optimizers, said = Optimizers(parameters, **options), []
    overflows = Overflows(Optimizers, 1.0, "dispatch_capacity", torch.device("cpu"), said.append)
    even = torch.arange(TOKENS * K).view(TOKENS, K) % E

    def step(ids: torch.Tensor, layer: str) -> bool:
        """Whether the step moved the parameters."""
        before = [p.detach().clone() for p in parameters]
        out = routed_experts(torch.randn(TOKENS, D), *parameters, ids, torch.ones(TOKENS, K), exchange, layer)
        out.square().sum().backward()
        optimizers.step()
        optimizers.zero_grad()
        moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
        assert all(moved) or not any(moved)
        return all(moved)

    one = torch.zeros_like(even)  # all to an expert of rank 0
    assert step(even, "layers.0") and said == []
    assert not step(one, "layers.1") and said == []
    assert step(even, "layers.0")
    mine = [
        "flashmoe: the last step was skipped: the experts of layer layers.1 on rank 0 of their group had no room for 12"
        " rows beyond 12; set dispatch_capacity above 1"
    ]
    assert said == (mine if dist.get_rank() == 0 else [])
    assert not step(one, "layers.1")
    with torch.no_grad():
        routed_experts(torch.randn(TOKENS, D), *parameters, one, torch.ones(TOKENS, K), exchange, "layers.2")
    overflows.report_validation()  # of which the step before is not forgotten, and the next one not to blame
    assert step(even, "layers.0")
    if dist.get_rank() == 0:
        validation = mine[0].replace("the last step was skipped", "the held-out loss leaves rows out")
        assert said == [*mine, *mine, validation.replace("layers.1", "layers.2")]
    assert (overflows.skipped_steps, overflows.lost_rows) == (2, 24)
    for _ in range(MOST_SKIPPED):
        assert not step(one, "layers.1")
    with pytest.raises(UsageError, match=f"^{MOST_SKIPPED} steps in a row .* set dispatch_capacity above 1; the logs"):
        step(even, "layers.0")
    overflows.close()
    forget()


def check_all() -> None:
    check({"fused": True})
    check({"foreach": True})


def test_overflow_skips_the_step() -> None:
    processes.run(check_all)
