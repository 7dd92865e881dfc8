"""What a beam costs: against as many greedy streams, and against transformers' beam search.

    python -m benchmarks.beam [--shape small] [--widths 1 2 4 8 16] [--dtype float32] [--no-peer]

A network of noise is written to a temporary folder and loaded by both. For each width k, all to
the same forced length from the same prompt: a beam of width k, one request of k greedy choices in
the same engine, and `generate(num_beams=k)`. Both of ours read the prompt once. Logits of noise are
nearly flat: beams change places and copy pages at every step. `selection` is the search itself, on
the host. Columns with `cpu` compare CPU time, which neighbours on a busy machine do not lengthen;
with more than one thread it also counts threads that wait.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import harness
from benchmarks.harness import Times
from model.device import cores
from model.sampling import Sampling
from model.start import Ready, start
from server.engine.admission import Options
from server.engine.beam_group import BeamGroup
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Beams, Request

GOAL = 1.10  # a width-4 beam over four greedy streams
PEER_GOAL = 3.0  # times transformers, width 4
# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (256, 768, 4, 4, 2, 4096),
    "small": (512, 2048, 8, 8, 2, 32_000),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
}
BEAM, GREEDY, PEER = "beam", "greedy", "transformers"


def write(folder: Path, shape: str) -> None:
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = transformers.Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def beam_request(prompt: list[int], tokens: int, width: int) -> Request:
    beams = Beams(width=width, exact_exit=False)
    return Request(id=BEAM, prompt=prompt, max_tokens=tokens, beams=beams)


def greedy_request(prompt: list[int], tokens: int, width: int) -> Request:
    greedy = Sampling(temperature=0)
    return Request(id=GREEDY, prompt=prompt, max_tokens=tokens, n=width, sampling=greedy)


def serve(ready: Ready, request: Request) -> None:
    """One request in an engine of its own, so that no prefix is found."""
    pages = Pages(ready.pages, ready.runner.cache.page_size)
    engine = Engine(ready.runner, pages, Options(seats=32, vocabulary=ready.config.vocabulary))
    engine.submit(request)
    given: dict[int, int] = {}
    while not engine.idle:
        for event in engine.step():
            for choice in event.choices:
                given[choice.index] = given.get(choice.index, 0) + len(choice.tokens)
    if set(given.values()) != {request.max_tokens}:
        raise RuntimeError(f"{request.id} gave {given} tokens instead of {request.max_tokens}")


def generate(peer: Any, prompt: list[int], tokens: int, width: int) -> None:
    given = torch.tensor([prompt], device=peer.device)
    with torch.inference_mode():
        peer.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens,
            min_new_tokens=tokens, num_beams=width, do_sample=False, pad_token_id=0,
        )  # fmt: skip


def selection(width: int, steps: int = 300) -> float:
    """Microseconds of CPU time for a step's search and stable prefix."""
    request = beam_request([0], steps, width)
    group = BeamGroup(request, 1 << 20)
    chance = np.random.default_rng(0)
    tokens = chance.permuted(np.tile(np.arange(4096, dtype=np.int32), (width, 1)), axis=1)
    shape = (steps, width, group.candidates)
    logprobs = -np.sort(chance.exponential(size=shape).astype(np.float32), axis=-1)
    begin = time.thread_time()
    for step in logprobs:
        rows = len(group.live)
        group.advance(tokens[:rows, : group.candidates], step[:rows])
    return (time.thread_time() - begin) / steps * 1e6


def rivals(given: Namespace, folder: Path) -> dict[str, Callable[[int], None]]:
    pages = 64 + max(given.widths) * -(-(given.prompt + given.tokens) // 16)
    ready = start(
        folder, device=given.device, dtype=given.dtype, threads=given.threads, pages=pages, rows=32
    )
    prompt = torch.randint(0, ready.config.vocabulary, (given.prompt,)).tolist()
    ways: dict[str, Callable[[int], None]] = {
        BEAM: lambda k: serve(ready, beam_request(prompt, given.tokens, k)),
        GREEDY: lambda k: serve(ready, greedy_request(prompt, given.tokens, k)),
    }
    if not given.no_peer:
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=given.dtype)
        peer = peer.to(ready.runner.device).eval()

        def whole(k: int) -> None:
            """With all the threads that Kvist's own kernels may take."""
            few = torch.get_num_threads()
            torch.set_num_threads(given.threads or cores())
            generate(peer, prompt, given.tokens, k)
            torch.set_num_threads(few)

        ways[PEER] = whole
    return ways


def row(width: int, times: dict[str, Times], tokens: int) -> dict[str, Any]:
    beam, greedy, peer = times[BEAM], times[GREEDY], times.get(PEER)
    found = {
        "width": width,
        "beam tok/s": tokens / beam.median,
        "spread": beam.spread,
        "beam ms": 1e3 * beam.median / tokens,
        "greedy ms": 1e3 * greedy.median / tokens,
        "ratio": beam.median / greedy.median,
        "cpu ratio": min(beam.cpu) / min(greedy.cpu),
        "selection µs": selection(width),
    }
    if peer:
        found["transformers ms"] = 1e3 * peer.median / tokens
        found["times"] = peer.median / beam.median
        found["cpu times"] = min(peer.cpu) / min(beam.cpu)
    return found


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-peer", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), given.shape)
        ways = rivals(given, Path(name))
        rows = []
        for width in given.widths:
            runs = {way: partial(run, width) for way, run in ways.items()}
            times = harness.take_turns(runs, given.rounds, shown=f"width {width}")
            rows.append(row(width, times, given.tokens))
    steps = {way: [each[f"{way} ms"] for each in rows] for way in ways}
    harness.plot(
        given.plot, "A beam of k, k greedy streams", "k", "ms a token",
        {way: ([float(k) for k in given.widths], found) for way, found in steps.items()},
    )  # fmt: skip
    four = next((each for each in rows if each["width"] == 4), {})
    harness.finish(
        "beam", rows, given, shape=given.shape, prompt=given.prompt, tokens=given.tokens,
        dtype=given.dtype, transformers=transformers.__version__, ratio=four.get("ratio"),
        goal=GOAL, times_transformers=four.get("times"), peer_goal=PEER_GOAL,
    )  # fmt: skip


if __name__ == "__main__":
    main()
