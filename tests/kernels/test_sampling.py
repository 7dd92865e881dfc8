"""The kept set against transformers' warpers, the draw against exact integers in Python.

transformers is imported where it is needed: the interpreter's process loads this page as well.
"""

from bisect import bisect_right
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import backend, build, native, sampling, sampling_triton
from kernels.config import Config
from kernels.sampling import branch_key, keep, uniform_bits
from tests.kernels.poison import poisoned

OFF = (1.0, 0, 1.0, 0.0, 1.0)


def kept_weights(logits: Tensor, settings: Tensor, width: int) -> Tensor:
    """By id, [m, vocabulary]."""
    ids, weights = keep(logits, settings, width)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    return torch.zeros(logits.shape, dtype=torch.int64).scatter_(1, ids, weights)


def random_settings(rng: np.random.Generator, rows: int) -> Tensor:
    """(temperature, top_k, top_p, min_p, typical_p), each on in half of the rows."""
    on = rng.random((rows, 5)) < 0.5
    drawn = np.stack(
        [
            rng.uniform(0.3, 2, rows),
            rng.integers(2, 60, rows),
            rng.uniform(0.05, 0.99, rows),
            rng.uniform(0.001, 0.2, rows),
            rng.uniform(0.05, 0.99, rows),
        ],
        1,
    )
    return torch.from_numpy(np.where(on, drawn, OFF).astype(np.float32))


def random_logits(rng: np.random.Generator, rows: int, size: int) -> Tensor:
    """From flat to peaked, with some masked ids."""
    logits = rng.normal(size=(rows, size)) * rng.uniform(0.3, 6, (rows, 1))
    logits[rng.random((rows, size)) < 0.05] = -np.inf
    return torch.from_numpy(logits.astype(np.float32))


def random_bits(rng: np.random.Generator, rows: int) -> Tensor:
    return torch.from_numpy(rng.integers(-(2**63), 2**63, rows))


def warped(logits: Tensor, settings: Any) -> Tensor:
    """One row's probabilities through transformers' warpers, in `generate`'s order; float64."""
    from transformers.generation import logits_process as hf

    temperature, top_k, top_p, min_p, typical_p = settings
    chain: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
    if top_k:
        chain.append(hf.TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        chain.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        chain.append(hf.MinPLogitsWarper(min_p))
    if typical_p < 1:
        chain.append(hf.TypicalLogitsWarper(typical_p))
    scores: Tensor = hf.LogitsProcessorList(chain)(torch.zeros(1, 1).long(), logits.double()[None])
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("size", [5, 300, 1031])
@pytest.mark.parametrize("width", [61, 1 << 20])  # of the first look: too narrow often; everything
def test_kept_tokens_are_those_of_transformers(size: int, width: int) -> None:
    rng = np.random.default_rng(size)
    settings, logits = random_settings(rng, 200), random_logits(rng, 200, size)
    weights = kept_weights(logits, settings, width).double()
    for row in range(200):
        wanted = warped(logits[row], settings[row].tolist())
        got = weights[row] / weights[row].sum()
        scores = logits[row] / settings[row, 0]
        faint = (scores - scores.max()).double().exp() < 2.0**-40  # weighs less than one unit
        assert torch.equal(got > 0, (wanted > 0) & ~faint), settings[row]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("enabled", [False, True])
def test_native_draws_what_the_twin_draws(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if enabled:
        try:
            build.compiled()
        except build.NotHere as why:
            pytest.skip(f"no native kernels here: {why}")
    monkeypatch.setattr(native, "enabled", enabled)
    for size in (3, 257, 4099, 9000):
        rng = np.random.default_rng(size)
        settings, logits = random_settings(rng, 150), random_logits(rng, 150, size)
        settings[::7, 0] = 0
        settings[1::3, 1:] = torch.tensor(sampling.OFF)
        bits = random_bits(rng, 150)
        wanted = sampling.sample_reference(logits, bits, settings)
        assert torch.equal(sampling.sample_native(logits, bits, settings), wanted)


def test_a_draw_is_the_inverse_of_the_running_sum_in_exact_integers() -> None:
    rng = np.random.default_rng(0)
    logits, bits = random_logits(rng, 100, 50), random_bits(rng, 100)
    bits[0], bits[1] = -1, 0  # u just below 1, and 0
    settings = torch.tensor([OFF] * 100)
    tokens = sampling.sample(logits, bits, settings)
    for row, weights in enumerate(kept_weights(logits, settings, 50).tolist()):
        share = int(bits[row]) % 2**64 >> 11
        at = share * sum(weights) >> 53  # in float64 it may round up over an edge: not here
        assert tokens[row] == bisect_right(list(accumulate(weights)), at)
    assert tokens[0] == logits[0].isfinite().nonzero().max()


def test_equals_stay_together() -> None:
    logits = torch.tensor([[3.0, 1, 1, 1, 0, -5]])
    for settings in ((1.0, 2, 1.0, 0.0, 1.0), (1.0, 0, 0.75, 0.0, 1.0)):
        weights = kept_weights(logits, torch.tensor([settings]), 6)
        assert (weights[0] > 0).tolist() == [True] * 4 + [False] * 2


def test_the_best_token_is_always_kept() -> None:
    logits = torch.linspace(0, 1, 40)[None]
    tiny = torch.tensor([[1, 0, 0.0, 0, 1], [1, 0, 1, 1.0, 1], [1, 0, 1e-6, 0.999, 0.0]])
    weights = kept_weights(logits.expand(3, -1), tiny, 40)
    assert (weights > 0).sum(-1).tolist() == [1, 1, 1]
    assert (weights[:, 39] > 0).all()


def splitmix64(state: int) -> int:
    """Vigna's reference, written with Python's integers: the next output of a state."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_random_bits_are_splitmix64() -> None:
    # The first outputs for state 0, as published with the algorithm's reference code.
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    bits = uniform_bits(np.zeros(3, np.uint64), np.arange(3))
    assert [int(b) % 2**64 for b in bits] == known
    golden = 0x9E3779B97F4A7C15
    for seed, branch in ((0, 0), (7, 3), (-1, 0), (2**64 - 1, 5), (2**63 + 11, 2**20)):
        key = splitmix64(splitmix64(seed % 2**64) + branch * golden)
        assert branch_key(seed, branch) == key
        assert int(uniform_bits(np.array([key], np.uint64), np.array([9]))[0]) % 2**64 == (
            splitmix64((key + 9 * golden) % 2**64)
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [3, 200, 4500])  # less than a tile, and two of the kernel's own
def test_the_kernel_draws_what_the_twin_draws(size: int) -> None:
    rows = 15 if size < 4096 else 3
    rng = np.random.default_rng(size)
    settings, logits = random_settings(rng, rows), random_logits(rng, rows, size)
    settings[1::6, 0] = 0
    logits[0] = logits[0].round()  # equals everywhere
    if size == 200:
        logits[2], logits[3, 7], logits[4, 9], logits[5] = -torch.inf, torch.nan, torch.inf, 1.5
    bits = random_bits(rng, rows)
    with poisoned():
        got = sampling.SAMPLE.triton(logits, bits, settings)
    assert got.tolist() == sampling.sample_reference(logits, bits, settings).tolist()


@pytest.mark.interpreter
def test_parts_change_no_draw() -> None:
    """One part or many; what filters keep gathered, or too much of it and the whole row read."""
    rng = np.random.default_rng(1)
    settings, logits = random_settings(rng, 14), random_logits(rng, 14, 150)
    settings[:2, 1:] = torch.tensor(OFF[1:])
    settings[2, 0] = 0
    bits, gathered = random_bits(rng, 14), []

    def keep(kernel: Any, grid: Any, *args: Any, **sizes: Any) -> None:
        backend.launch(kernel, grid, *args, **sizes)
        if kernel.fn.__name__ == "_pick":
            gathered.append(args[5][settings[:, 0] > 0])

    drawn = []
    for tile in (64, 256):
        with (
            patch.dict(sampling_triton.CONFIGS, {("part",): Config(tile, 4)}),
            patch.object(sampling_triton, "launch", keep),
            poisoned(),
        ):
            drawn.append(sampling.SAMPLE.triton(logits, bits, settings).tolist())
    assert drawn[0] == drawn[1] == sampling.sample_reference(logits, bits, settings).tolist()
    assert (gathered[0] > 0).sum() > 3
    assert (gathered[0] == -1).sum() > 3


def test_sample_refuses_settings_of_other_rows() -> None:
    with pytest.raises(ValueError, match=r"2 rows want settings of \[2, 5\]"):
        sampling.sample(torch.zeros(2, 9), torch.zeros(2).long(), torch.zeros(1, 5))
