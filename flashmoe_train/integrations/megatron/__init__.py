"""Megatron-core. `swap(spec, config)` puts our attention and mixture-of-experts layers into a layer specification;
`install_flex_dispatcher()` puts our permute and combine where a launch script chooses dispatchers by configuration.

All else in this folder is for recipes: `runner` is their training loop, `cpu` lets Megatron run without a GPU.
"""

from flashmoe_train.integrations.megatron.flex import install_flex_dispatcher
from flashmoe_train.integrations.megatron.specs import swap

__all__ = ["install_flex_dispatcher", "swap"]
