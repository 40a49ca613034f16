"""TorchTitan. Importing this package registers what the installed generation of it can be extended by:

- 0.2.x, by `[job] custom_config_module` or `[experimental] custom_import`: the model converter "flashmoe" and the
  `[flashmoe]` table that says what it swaps (`converters`);
- 0.3.x, by `--override.imports`: the overrides of `overrides`; by `--module` and `--config`: recipes, from its
  `config_registry`;
- both: the data sets "torch_sources" and "torch_sources_heldout".

Nothing else of TorchTitan changes; `runner` starts it for `flashmoe train`.
"""

import importlib

from flashmoe_train.integrations.torchtitan import cpu, generation

cpu.apply()  # before anything imports torchtitan, as the next lines do

from flashmoe_train.integrations.torchtitan import datasets  # noqa: E402, F401  (registers itself)
from flashmoe_train.integrations.torchtitan.config import JobConfig  # noqa: E402

importlib.import_module(f"{__name__}.{generation.name()}")

__all__ = ["JobConfig"]
