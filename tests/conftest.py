"""What every test shares: its worker's part of the cores; GPU tests are skipped, saying so, where there is no GPU."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Pytest's workers, and the processes that tests start, share the cores: threads that wait for each other's cores
    take ten times as long. Code that one thread generates needs no processes beside it that compile."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
