"""Sizes of models for the tests of both generations."""

import tomllib

from flashmoe_train.recipe import find, read
from flashmoe_train.schema import Model, parse

# A config, changes, and what is said: what neither generation's models have.
REFUSED = [
    ("llama3_debug", "head_dim = 32", r"\[model\] head_dim = 32: in TorchTitan's llama3 it is hidden_size / heads"),
    (
        "qwen3_moe_debug",
        "moe = { num_experts = 4, num_experts_per_tok = 1, moe_intermediate_size = 8, first_k_dense_replace = 1 }",
        r"first_k_dense_replace: every layer of TorchTitan's qwen3 has experts",
    ),
]


def sizes(config: str, changes: str = "") -> Model:
    return parse(Model, read(find(config, "config")) | tomllib.loads(changes))
