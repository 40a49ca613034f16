"""The bench of Transformers' blocks: its check finds errors in every tensor; without Transformers it says so."""

import sys

import pytest
import torch

from flashmoe_train.bench import Options, moe_transformers, run
from flashmoe_train.bench.results import read

CASE = moe_transformers.TINY[0]


@pytest.mark.parametrize("case", moe_transformers.TINY, ids=lambda case: case.family)
@pytest.mark.parametrize("tensor", range(5))  # out; the gradients of x, gate_up, down and the router's weight
def test_errors_are_found(case: moe_transformers.Case, tensor: int) -> None:
    problem = moe_transformers._prepare(case, torch.device("cpu"))
    found = list(problem.contenders["grouped_mm"]()())
    assert len(found) == 5 and problem.error(tuple(found)) < problem.error_bound
    found[tensor] = found[tensor] * (1 + 1e-3)
    assert problem.error(tuple(found)) > problem.error_bound


def test_implementations_share_parameters_and_nothing_else() -> None:
    problem = moe_transformers._prepare(CASE, torch.device("cpu"))
    first, second = (problem.contenders[name]() for name in ("flashmoe", "eager_loop"))
    before = [x.clone() for x in first()]
    second()
    assert all(torch.equal(a, b) for a, b in zip(first(), before, strict=True))


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in [name for name in sys.modules if name.startswith("flashmoe_train.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(Options("moe_transformers", json=tmp_path, device="cpu")) == 0
    assert all("transformers" in row.skipped["*"] for row in read(tmp_path / "moe_transformers.json").rows)
