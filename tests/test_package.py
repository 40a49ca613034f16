"""What `import flashmoe_train` brings, and what comes when it is asked for."""

import subprocess
import sys

import pytest

import flashmoe_train

# In a process of its own, which has imported nothing yet.
FIRST_USE = """
import sys
import flashmoe_train.cli
import torch
slow = [name for name in sys.modules if name == "torch._dynamo" or name.startswith("flashmoe_train.ops")]
assert not slow, slow
attention = torch.compile(lambda q: flashmoe_train.attention(q, q, q, causal=True), fullgraph=True, backend="aot_eager")
q = torch.randn(1, 16, 2, 16)
torch.testing.assert_close(attention(q), flashmoe_train.ops.attention.attention(q, q, q, causal=True))
assert torch.ops.flashmoe.attention_forward and flashmoe_train.nn.MoE and flashmoe_train.swap_sdpa
assert flashmoe_train.ops.expert_parallel.routed_experts
"""


def test_operators_come_with_their_first_use_compiled_or_not() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_that_is_public_is_there() -> None:
    for name in flashmoe_train.__all__:
        assert getattr(flashmoe_train, name) is not None
    with pytest.raises(AttributeError, match="module 'flashmoe_train' has no attribute 'atention'"):
        flashmoe_train.atention  # noqa: B018
