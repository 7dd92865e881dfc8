"""What a beam costs: against as many greedy streams, and against transformers' beam search.

    python -m benchmarks.beam [--shape small] [--widths 1,2,4,8,16] [--dtype float32] [--no-peer]

A network of noise is written to a temporary folder and loaded by both. For each width k, in turns
and in one process, all to the same forced length from the same prompt: a beam of width k, one
request of k greedy choices in the same engine, and `generate(num_beams=k)`. Both of ours read the
prompt once. Logits of noise are nearly flat: beams change places and copy pages at every step.
`selection` is the search itself, on the host. On a busy machine, `--clock cpu --threads 1` counts
work, which neighbours do not lengthen. Ends in one JSON line.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from model.sampling import Sampling
from model.start import Ready, start
from server.engine.admission import Options
from server.engine.beam_group import BeamGroup
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Beams, Request

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
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
    if peer.device.type == "cuda":
        torch.cuda.synchronize()


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


def measure(
    ways: dict[str, Callable[[int], None]], widths: list[int], rounds: int, clock: str
) -> dict[str, dict[int, float]]:
    """Seconds, the best of the rounds, which neighbours only lengthen; the first one warms up."""
    seconds: dict[str, dict[int, list[float]]] = {w: {k: [] for k in widths} for w in ways}
    now = CLOCKS[clock]
    for width in tqdm(widths, desc="widths"):
        for _ in range(rounds + 1):
            for way, run in ways.items():
                begin = now()
                run(width)
                seconds[way][width].append(now() - begin)
    return {
        way: {width: min(times[1:]) for width, times in found.items()}
        for way, found in seconds.items()
    }


def table(seconds: dict[str, dict[int, float]], tokens: int, hosts: dict[int, float]) -> None:
    peer = PEER in seconds
    head = f"\n{'width':>6}{'beam tok/s':>12}{'greedy s':>10}{'beam s':>9}{'ratio':>8}"
    print(f"{head}{'selection µs':>14}" + (f"{'transformers s':>16}{'times':>8}" if peer else ""))
    for width, beam in seconds[BEAM].items():
        greedy = seconds[GREEDY][width]
        line = f"{width:6}{tokens / beam:12.1f}{greedy:10.3f}{beam:9.3f}{beam / greedy:8.3f}"
        line += f"{hosts[width]:14.0f}"
        if peer:
            line += f"{seconds[PEER][width]:16.3f}{seconds[PEER][width] / beam:8.2f}"
        print(line)


def plot(seconds: dict[str, dict[int, float]], tokens: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = {BEAM: "beam of k", GREEDY: "k greedy streams", PEER: "transformers, num_beams=k"}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for way, found in seconds.items():
        steps = [1e3 * value / tokens for value in found.values()]
        axes.plot(list(found), steps, marker="o", label=names[way])
    axes.set(xlabel="width k", ylabel="ms a token", xscale="log", xticks=list(seconds[BEAM]))
    axes.set_xticks(list(seconds[BEAM]), [str(width) for width in seconds[BEAM]])
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--widths", default="1,2,4,8,16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--plot", type=Path, help="where to put the picture")
    given = parser.parse_args()
    widths = [int(width) for width in given.widths.split(",")]
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), given.shape)
        pages = 64 + max(widths) * -(-(given.prompt + given.tokens) // 16)
        ready = start(
            Path(name), device=given.device, dtype=given.dtype, threads=given.threads,
            pages=pages, rows=32,
        )  # fmt: skip
        prompt = torch.randint(0, ready.config.vocabulary, (given.prompt,)).tolist()
        ways: dict[str, Callable[[int], None]] = {
            BEAM: lambda k: serve(ready, beam_request(prompt, given.tokens, k)),
            GREEDY: lambda k: serve(ready, greedy_request(prompt, given.tokens, k)),
        }
        if not given.no_peer:
            peer = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=given.dtype)
            peer = peer.to(ready.runner.device).eval()
            ways[PEER] = lambda k: generate(peer, prompt, given.tokens, k)
        seconds = measure(ways, widths, given.rounds, given.clock)
    hosts = {width: selection(width) for width in widths}
    table(seconds, given.tokens, hosts)
    if given.plot:
        plot(seconds, given.tokens, given.plot)
    report(seconds, hosts, vars(given) | {"widths": widths, "about": ready.about})


def report(
    seconds: dict[str, dict[int, float]], hosts: dict[int, float], given: dict[str, Any]
) -> None:
    ratios = {k: round(beam / seconds[GREEDY][k], 3) for k, beam in seconds[BEAM].items()}
    found: dict[str, Any] = {"benchmark": "beam", "ratio": ratios.get(4), "goal": GOAL}
    if PEER in seconds:
        times = {k: round(peer / seconds[BEAM][k], 2) for k, peer in seconds[PEER].items()}
        found |= {"times_transformers": times.get(4), "peer_goal": PEER_GOAL, "all_times": times}
    conditions = {
        name: given[name] for name in ("shape", "prompt", "tokens", "dtype", "rounds", "clock")
    }
    print(json.dumps(found | {
        "ratios": ratios,
        "seconds": {w: {k: round(s, 4) for k, s in v.items()} for w, v in seconds.items()},
        "selection_us": {k: round(value, 1) for k, value in hosts.items()},
        "device": given["about"]["device"], "threads": given["about"]["threads"],
        "cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    } | conditions))  # fmt: skip


if __name__ == "__main__":
    main()
