"""The tests of a generation of TorchTitan run where it is installed: 0.2.x beside this file, 0.3.x in `overrides`."""

from flashmoe_train.integrations.torchtitan import generation

_OF_BOTH = {"test_generation.py", "test_first_loss.py", "test_cpu.py"}

if generation.name() == "overrides":
    from pathlib import Path

    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in _OF_BOTH]
else:
    collect_ignore = ["overrides"]
