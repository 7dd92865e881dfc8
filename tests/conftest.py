"""What every test shares: which tests can run here, and one thread a worker."""

import pytest
import torch


def pytest_configure() -> None:
    """Workers share two cores; a thread each is faster than two that fight."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
