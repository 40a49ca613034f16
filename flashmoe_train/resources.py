"""Files: finds those that travel with the package, replaces those that several processes share."""

import random
from pathlib import Path


def resource(name: str) -> Path:
    """The path of `recipes`, `versions.toml`, ...: in a wheel beside the code, in a checkout one folder up."""
    package = Path(__file__).parent
    for path in (package / name, package.parent / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} belongs to flashmoe_train but is neither in {package} nor in {package.parent}")


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step, so that no process that writes or reads it too sees half of it."""
    temporary = path.with_name(f".{path.name}.{random.SystemRandom().randrange(2**48):012x}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
