"""`python -m server generate`: one prompt, its continuation on the terminal as it comes."""

import sys

from model.sampling import Sampling
from server.blueprint import engine_options
from server.config import Settings, Wish
from server.engine.offline import Engine
from server.engine.request import Beams, Request


def run(settings: Settings, prompt: str, wish: Wish) -> int:
    engine = Engine(**engine_options(settings))
    ends = engine.parts.eos
    sampling = Sampling(
        temperature=wish.temperature,
        top_k=wish.top_k,
        top_p=wish.top_p,
        min_p=wish.min_p,
        repetition_penalty=wish.repetition_penalty,
        seed=wish.seed,
        stops=ends,
    )
    request = Request(
        id="generate",
        prompt=engine.parts.tokenizer.encode(prompt),
        max_tokens=wish.max_tokens,
        sampling=sampling,
        eos=ends,
        beams=Beams(width=wish.beams) if wish.beams > 1 else None,
        stop=wish.stop,
    )
    engine.submit(request)
    print(prompt, end="", flush=True)
    while not engine.idle:
        for event in engine.step():
            if event.error:
                print(f"\n{event.error}", file=sys.stderr)
                return 1
            for choice in event.choices:
                print(choice.text, end="", flush=True)
    print()
    return 0
