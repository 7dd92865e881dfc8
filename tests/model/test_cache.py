"""What keys and values in pages are for: a token costs its own work, not its prefix's."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_suite import SHAPES
from model.cache import Cache, Rows
from model.checkpoint import locate
from model.decoder import Decoder
from model.tokenizer import Tokenizer
from model.weights import load

GPT2 = SHAPES["GPT-2 124M"]


def work(decoder: Decoder, tokens: torch.Tensor, rows: Rows, cache: Cache | None) -> int:
    """Floating-point operations of a step, and of the last token's logits."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = decoder(tokens, rows, cache)
        decoder.logits(hidden[-1:])
    return counter.get_total_flops()


def test_token_512_costs_a_twentieth_of_its_prefix() -> None:
    """Counted, not timed: `python -m benchmarks.latency` has the time."""
    total, page = 512, 16
    pages = -(-total // page)
    decoder, cache = Decoder(GPT2), Cache(GPT2, pages, page)
    tokens = torch.randint(0, GPT2.vocabulary, (total,))
    whole = work(decoder, tokens, Rows.alone([total]), None)
    last = torch.tensor([total - 1])
    row = Rows(
        positions=last,
        starts=torch.tensor([0, 1], dtype=torch.int32),
        longest_query=1,
        longest_context=total,
        lengths=torch.tensor([total], dtype=torch.int32),
        page_table=torch.arange(pages, dtype=torch.int32)[None],
        slots=last,
    )
    assert work(decoder, tokens[-1:], row, cache) * 20 <= whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_page_is_as_large_as_it_says(dtype: torch.dtype) -> None:
    cache = Cache(GPT2, 7, 16, dtype)
    scales = 0 if cache.scales is None else cache.scales.nbytes
    assert (cache.pages.nbytes + scales) // 7 == Cache.page_bytes(GPT2, 16, dtype)


LITTLE = [(torch.int8, 4e-4), (torch.float8_e4m3fn, 1e-2), (torch.bfloat16, 4e-5)]


@pytest.mark.parametrize(("dtype", "most"), LITTLE)
def test_fewer_bits_change_little(dtype: torch.dtype, most: float) -> None:
    """The embedded model over code, in chunks through pages; measured 6e-5, 2e-3, 9e-6 nats."""
    folder = locate(None)
    decoder = load(folder, dtype="float32")
    text = torch.tensor(Tokenizer.load(folder).encode(Path(__file__).read_text())[:256])

    def chances(dtype: torch.dtype) -> torch.Tensor:
        cache, parts = Cache(decoder.config, 16, 16, dtype), []
        for end in range(64, 257, 64):
            rows = Rows(
                positions=torch.arange(end - 64, end),
                starts=torch.tensor([0, 64], dtype=torch.int32),
                longest_query=64,
                longest_context=end,
                lengths=torch.tensor([end], dtype=torch.int32),
                page_table=torch.arange(16, dtype=torch.int32)[None],
                slots=torch.arange(end - 64, end),
            )
            parts.append(decoder.logits(decoder(text[end - 64 : end], rows, cache)))
        return torch.cat(parts).double().log_softmax(-1)

    with torch.inference_mode():
        whole, ours = chances(torch.float32), chances(dtype)
    found = (whole.exp() * (whole - ours)).sum(-1).mean()
    assert 0 < found < most
