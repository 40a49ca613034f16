"""A wheel, installed anywhere, brings its recipes, its versions and, where nvcc built it, its library along."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_is_complete(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Whether the library is there is the question, not how fast it is: nvcc takes half the time to optimise nothing.
    constraints, flags = str(ROOT / "constraints.txt"), "-Xcicc -O0 -Xptxas -O0"
    environment = os.environ | {"PIP_CONSTRAINT": constraints, "NVCC_APPEND_FLAGS": flags}
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], env=environment, check=True)
    (wheel,) = tmp_path.glob("flashmoe_train-*-py3-none-linux_x86_64.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    assert (site / "flashmoe_train/libflashmoe_cuda.so").exists() == (nvcc is not None)
    program = (
        # -S: without this environment's own, editable installation, but with its torch.
        f"import sys; sys.path[:0] = {[str(site), sysconfig.get_path('purelib')]!r}\n"
        "from flashmoe_train import recipe, versions\n"
        "print(recipe.find('quickstart'), len(versions.tested()))"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(site / "flashmoe_train/recipes/quickstart.toml"))
