"""What keys and values in pages are for: a token costs its own work, not its prefix's."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_suite import SHAPES
from model.cache import Cache, Rows
from model.decoder import Decoder

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


def test_a_page_is_as_large_as_it_says() -> None:
    cache = Cache(GPT2, 7, 16, torch.bfloat16)
    each = cache.pages.element_size() * cache.pages.numel() // 7
    assert each == Cache.page_bytes(GPT2, 16, torch.bfloat16)
