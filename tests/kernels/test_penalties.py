"""Penalties and masks against arithmetic in Python, each way against the twin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import penalties
from kernels.backend import Call, call, differs
from kernels.penalties import penalise
from tests.kernels.poison import poisoned


def made(rows: int, size: int) -> tuple[Tensor, ...]:
    """Some rows have counts, some a mask, some both, some neither."""
    rng = np.random.default_rng(size)
    logits = torch.from_numpy(rng.normal(size=(rows, size)).astype(np.float32) * 3)
    logits[:, 0] = -torch.inf
    counts = torch.from_numpy(rng.integers(-9, 9, (4, size)).clip(0).astype(np.int32))
    masks = torch.from_numpy(rng.integers(-(2**31), 2**31, (3, -(-size // 32))).astype(np.int32))
    slots, masked = (torch.from_numpy(rng.integers(-1, n, rows)) for n in (4, 3))
    settings = np.stack([rng.uniform(0.5, 2, rows), *rng.normal(size=(2, rows))], 1)
    return logits, counts, slots, torch.from_numpy(settings.astype(np.float32)), masks, masked


@pytest.mark.parametrize("way", [penalties.penalise_reference, penalties.penalise_native, penalise])
def test_every_way_against_python(way: penalties.Way) -> None:
    logits, counts, slots, settings, masks, masked = made(12, 77)
    got = way(logits, counts, slots, settings, masks, masked)
    for row in range(12):
        repetition, frequency, presence = settings[row].double().tolist()
        for id in range(77):
            x = logits[row, id].item()
            if slots[row] >= 0 and (seen := int(counts[slots[row], id])):
                x = x / repetition if x > 0 else x * repetition
                x -= frequency * (seen // 2) + presence * (seen > 1)
            if masked[row] >= 0 and not int(masks[masked[row], id // 32]) >> id % 32 & 1:
                x = -torch.inf
            assert got[row, id].item() == pytest.approx(x, rel=1e-5, abs=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 33, 2100])
def test_the_kernel_against_its_twin(size: int) -> None:
    trial = Call(made(5, size), {})
    with poisoned():
        ways = call(penalties.PENALISE.triton, trial), call(penalties.PENALISE.twin, trial)
    assert differs(*ways, call(penalties.PENALISE.twin, trial, exactly=True)) == ""


def test_tables_of_another_vocabulary_are_refused() -> None:
    logits, counts, slots, settings, masks, masked = made(2, 64)
    with pytest.raises(ValueError, match="counts of 63 and masks of 2 words"):
        penalise(logits, counts[:, :63], slots, settings, masks, masked)
