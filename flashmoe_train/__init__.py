"""Fast attention and mixture-of-experts operators for training on Hopper GPUs.

`flashmoe_train.attention` and `flashmoe_train.moe` are functions over tensors, backed by `torch.ops.flashmoe.*`;
`flashmoe_train.nn` has modules over them, and `flashmoe_train.swap` puts them into a model that exists already.
`flashmoe_train.integrations` swaps them into the models of training frameworks; the `flashmoe` command trains.
"""

from flashmoe_train import nn
from flashmoe_train.integrations import pytorch as _pytorch  # noqa: F401  (registers its swaps)
from flashmoe_train.integrations.sdpa import swap_sdpa
from flashmoe_train.ops import expert_parallel as _expert_parallel  # noqa: F401  (defines its operators)
from flashmoe_train.ops.attention import attention
from flashmoe_train.ops.moe import moe
from flashmoe_train.swap import swap

swap.framework("transformers", "flashmoe_train.integrations.transformers")
swap.framework("megatron", "flashmoe_train.integrations.megatron.built")

__version__ = "0.1.0"
__all__ = ["attention", "moe", "nn", "swap", "swap_sdpa"]
