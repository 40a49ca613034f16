"""Fast attention and mixture-of-experts operators for training on Hopper GPUs.

`flashmoe_train.attention` and `flashmoe_train.moe` are functions over tensors, backed by `torch.ops.flashmoe.*`.
`flashmoe_train.integrations` swaps them into the models of training frameworks; the `flashmoe` command trains.
"""

from flashmoe_train.ops.attention import attention
from flashmoe_train.ops.moe import moe

__version__ = "0.1.0"
__all__ = ["attention", "moe"]
