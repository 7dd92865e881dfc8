"""Whole steps in Triton's interpreter: rows with a common beginning read it once, and nothing else
changes."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from kernels import attention_triton, backend, sharing
from model.batch import LAST_SAMPLE, Batch, Output, Seat
from model.cache import Cache
from model.decoder import Decoder
from model.runner import Runner
from model.sampling import Sampling
from model.weights import load
from tests.server.tiny import make

PAGE, PROMPT, COMMON = 8, 45, 40
NONE = np.zeros(0, np.int32)
ROWS = np.arange(3, dtype=np.int32)
TABLE = np.array([[0, 1, 2, 3, 4, own, own + 1] for own in (5, 7, 9)] + [range(11, 18)], np.int32)


def batch(tokens: list[int], length: int, **more: Any) -> Batch:
    """One token a row."""
    rows = np.arange(len(tokens), dtype=np.int32)
    fields: dict[str, Any] = {
        "tokens": np.array(tokens, np.int32),
        "starts": np.arange(len(tokens) + 1, dtype=np.int32),
        "lengths": np.full(len(tokens), length, np.int32),
        "page_table": TABLE[: len(tokens)],
        "seats": rows,
        "sample_at": rows,
        "sample_seat": rows,
        "top": 3,
        **dict.fromkeys(("score_at", "score_token", "beam_at", "beam_seat"), NONE),
    }
    return Batch(**fields | more)


def steps(decoder: Decoder, graphs: bool) -> tuple[list[Output], list[str]]:
    """Three branches beside a stranger, then the three as beams. → and the launches of attention"""
    device = decoder.embed.get_parameter("weight").device
    runner = Runner(decoder, Cache(decoder.config, 18, PAGE, device=device), 4, graphs=graphs)
    noise = torch.randn(runner.cache.pages.shape, generator=torch.Generator().manual_seed(0))
    runner.cache.pages.copy_(noise)
    seats = [Seat(i, Sampling(temperature=i % 2, seed=i), i, [], [], PROMPT) for i in range(4)]
    names: list[str] = []

    def keep(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        backend.launch(kernel, *args, **options)

    copies = np.array([[5, 7, PROMPT - COMMON], [5, 9, PROMPT - COMMON]], np.int32)
    beams = {"sample_at": NONE, "sample_seat": NONE, "beam_at": ROWS, "beam_seat": ROWS}
    with patch.object(attention_triton, "launch", keep):
        said = [
            runner.launch(one)()
            for one in (
                batch([5, 6, 7, 8], PROMPT + 1, taken=seats, copies=copies),
                batch([LAST_SAMPLE] * 4, PROMPT + 2),
                batch([3, 4, 5], PROMPT + 3, beam_width=4, **beams),
            )
        ]
    return said, names


@pytest.mark.interpreter
def test_shared_pages_change_no_step(tmp_path: Path) -> None:
    compare(load(make(tmp_path), dtype=torch.float32))


@pytest.mark.cuda
def test_shared_pages_change_no_step_on_a_gpu(tmp_path: Path) -> None:
    """The same with the kernels compiled, and graphs that are replayed."""
    compare(load(make(tmp_path), dtype=torch.float32, device="cuda"))


def compare(decoder: Decoder) -> None:
    apart, launched = steps(decoder, graphs=False)
    assert "_shared" not in launched
    for graphs in (False, True):
        with patch.object(sharing, "LEAST", ((3, COMMON),)):
            shared, launched = steps(decoder, graphs)
        # Three steps of two layers; a graph is launched once to warm up, and once to be recorded.
        assert launched.count("_shared") >= 3 * 2
        for ours, plain in zip(shared, apart, strict=True):
            assert np.array_equal(ours.tokens, plain.tokens)
            assert np.array_equal(ours.beam_tokens, plain.beam_tokens)
            for name in ("logprobs", "top_logprobs", "beam_logprobs"):
                np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), atol=1e-4)
