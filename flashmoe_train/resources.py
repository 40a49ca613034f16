"""Finds the data files that travel with the package: in a wheel beside the code, in a checkout one folder up."""

from pathlib import Path


def resource(name: str) -> Path:
    """The path of `recipes`, `versions.toml`, ..."""
    package = Path(__file__).parent
    for path in (package / name, package.parent / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} belongs to flashmoe_train but is neither in {package} nor in {package.parent}")
