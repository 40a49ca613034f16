"""Fast attention and mixture-of-experts operators for training on Hopper GPUs.

`flashmoe_train.attention` is a function over tensors, backed by `torch.ops.flashmoe.*`. `flashmoe_train.integrations`
swaps the operators into the models of training frameworks; the `flashmoe` command trains with them.
"""

from flashmoe_train.ops.attention import attention

__version__ = "0.1.0"
__all__ = ["attention"]
