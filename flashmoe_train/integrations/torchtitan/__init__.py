"""TorchTitan 0.2.x. Importing this package, by `[job] custom_config_module` or `[experimental] custom_import`, adds

- the model converter "flashmoe" and the `[flashmoe]` table that says what it swaps,
- the data sets "torch_sources" and "torch_sources_heldout".

Nothing else of TorchTitan changes; `runner` starts it for `flashmoe train`.
"""

from flashmoe_train.integrations.torchtitan import compat, cpu

cpu.apply()  # before anything imports torchtitan, as the next line does
compat.check_installed()

from flashmoe_train.integrations.torchtitan import converter, datasets  # noqa: E402, F401  (they register themselves)
from flashmoe_train.integrations.torchtitan.config import JobConfig  # noqa: E402

cpu.adjust_torchtitan()

__all__ = ["JobConfig"]
