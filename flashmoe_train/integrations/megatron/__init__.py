"""Megatron-core. `swap(spec, config)` puts our attention and mixture-of-experts layers into a layer specification.

All else in this folder is for recipes: `runner` is their training loop, `cpu` lets Megatron run without a GPU.
"""

from flashmoe_train.integrations.megatron.specs import swap

__all__ = ["swap"]
