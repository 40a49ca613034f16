"""Whether a Megatron-core that this integration knows is installed; and its import, without what it says of Apex."""

import importlib
import importlib.metadata
import importlib.util
import warnings

from packaging.version import Version

from flashmoe_train import versions
from flashmoe_train.errors import UsageError


def check() -> None:
    """Raises UsageError if none is installed, or one that has another way to build layers."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise UsageError("Megatron-core is not installed: pip install 'flashmoe-train[megatron]'")
    found = importlib.metadata.version("megatron-core")
    if Version(found) < Version("0.16"):
        raise UsageError(f"megatron-core {found} is too old. What works together:\n{versions.table('megatron-core')}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every module warns of what is not installed and not needed
        for module in ("distributed", "optimizer", "models.gpt.gpt_layer_specs", "models.gpt.gpt_model"):
            importlib.import_module(f"megatron.core.{module}")
