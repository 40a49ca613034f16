"""TorchTitan 0.2.x: modules of a model that is built are swapped by a model converter, jobs are TOML files."""

from flashmoe_train.integrations.torchtitan import cpu
from flashmoe_train.integrations.torchtitan.converters import converter  # noqa: F401  (registers itself)

cpu.permute_without_triton()
