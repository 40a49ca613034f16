"""What the server of test processes imports of Megatron, once for all of them, where it is installed."""

from flashmoe_train.errors import UsageError
from flashmoe_train.integrations.megatron import installed

try:
    installed.check()
except UsageError:
    pass
else:
    import flashmoe_train.integrations.megatron.attention
    import flashmoe_train.integrations.megatron.layer
    import flashmoe_train.integrations.megatron.runner  # noqa: F401
