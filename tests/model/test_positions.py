"""Positions against the formulas of their papers, where no family of transformers has them."""

import math

import pytest
import torch

from model.positions import alibi_slopes, sinusoid_table


def test_interleaved_waves_are_those_of_attention_is_all_you_need() -> None:
    table = sinusoid_table(50, 12, interleaved=True)
    for position in (0, 1, 7, 49):
        for i in range(6):
            angle = position / 10_000 ** (2 * i / 12)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 71])
def test_slopes_are_a_falling_power_row_with_halves_between(heads: int) -> None:
    whole = 2 ** math.floor(math.log2(heads))
    slopes = alibi_slopes(heads)
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    assert slopes[:whole].tolist() == pytest.approx(first)
    assert len(set(slopes.tolist())) == heads
    assert torch.all(slopes[whole:] > 0)
