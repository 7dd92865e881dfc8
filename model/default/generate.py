"""The shortest honest decode loop: one row, its own pages. The server's is the one to look at."""

import torch

from model.cache import PAGE, Cache, Rows
from model.decoder import Decoder


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: list[int],
    count: int,
    eos: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """At most `count` ids after the prompt, the likeliest ones when the temperature is 0."""
    random = torch.Generator().manual_seed(seed)
    pages = -(-(len(prompt) + count) // PAGE)
    cache = Cache(decoder.config, pages, dtype=next(decoder.parameters()).dtype)
    written, ids, answer = 0, prompt, list[int]()
    while len(answer) < count:
        hidden = decoder(torch.tensor(ids), _row(written, len(ids), pages), cache)
        logits = decoder.logits(hidden[-1:])[0]
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
        else:
            chosen = logits.argmax()
        written, ids = written + len(ids), [int(chosen)]
        if ids[0] == eos:
            break
        answer += ids
    return answer


def _row(written: int, new: int, pages: int) -> Rows:
    """Pages lie in order, so a token's slot is its position."""
    positions = torch.arange(written, written + new)
    return Rows(
        positions=positions,
        starts=torch.tensor([0, new], dtype=torch.int32),
        longest_query=new,
        longest_context=written + new,
        lengths=torch.tensor([written + new], dtype=torch.int32),
        page_table=torch.arange(pages, dtype=torch.int32)[None],
        slots=positions,
    )
