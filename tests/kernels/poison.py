"""Fresh memory that cannot be mistaken for a result."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels import backend


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_cleared() -> None:
    """Counters are ready for the next launch."""
    assert not any(one.any() for made in backend._counters.values() for one in made)
