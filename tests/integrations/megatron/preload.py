"""What the server of test processes imports last: Megatron, once for all of them, where it is installed."""

import gc

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

gc.freeze()  # Megatron collects garbage with every checkpoint, and would look through all of these modules each time
