import pytest
from torch import Tensor

from flashmoe_train.integrations import sdpa


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What our operator was called with."""
    found: list[dict] = []
    stock = sdpa.attention

    def spy(*tensors: Tensor, **options: object) -> Tensor:
        found.append(options)
        return stock(*tensors, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sdpa, "attention", spy)
    return found
