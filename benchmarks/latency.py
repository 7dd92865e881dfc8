"""How long a token takes: the first, over the prompt's length; the next, over context and batch.

    python -m benchmarks.latency [MODEL] [--prompts 16 256 1024] [--batches 1 4 16] [--over http]

`offline` is the engine in this process; `http` a server on loopback, and as many clients here as
the batch has rows. Percentiles over tokens, not means; the last columns are the share of the
machine's limits that a step reached: bytes of weights and of keys and values read against the
memory's bandwidth, and operations against the rate of products, both measured in this run.
"""

import asyncio
import resource
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import clients, harness, limits
from benchmarks.limits import Limits
from benchmarks.served import served
from model.cache import Cache
from model.device import cores
from model.quantize import FORMATS
from model.sampling import Sampling
from server import Engine
from server.engine.request import Request

NEW = 32  # tokens measured after the first


def token_times(engine: Engine, prompt: int, batch: int) -> tuple[float, list[float]]:
    """Seconds to the first token of all, and of every step after it."""
    chance = np.random.default_rng(0)
    greedy = Sampling(temperature=0)
    for i in range(batch):
        ids = chance.integers(1, engine.parts.ready.config.vocabulary - 1, prompt).tolist()
        name = f"{prompt}-{batch}-{i}-{time.monotonic_ns()}"
        engine.submit(Request(id=name, prompt=ids, max_tokens=NEW + 1, sampling=greedy))
    began = time.perf_counter()
    told: set[str] = set()
    while len(told) < batch:
        told |= {event.id for event in engine.step() if event.choices}
    first, steps = time.perf_counter() - began, []
    while not engine.idle:
        before = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - before)
    return first, steps


def weights(engine: Engine) -> tuple[int, int]:
    """Bytes that a step reads of them, and parameters that multiply."""
    config, about = engine.parts.ready.config, engine.info
    form = FORMATS.get(about["quantize"])
    bits = form.bits if form else 8 * about["weight_bytes"]
    embedded = 0 if config.tied else config.vocabulary * config.hidden
    used = about["parameters"] - embedded
    return used * bits // 8, used


@dataclass(frozen=True)
class Load:
    """What a step moves and multiplies, of one model."""

    read: int  # bytes of weights
    used: int  # parameters that multiply
    kv_token: int  # bytes of a token's keys and values
    ceiling: Limits

    def row(self, prompt: int, batch: int, first: float, steps: list[float]) -> dict[str, Any]:
        low, middle, high = (float(one) for one in np.percentile(steps, [5, 50, 95]))
        return {
            "prompt": prompt,
            "batch": batch,
            "first ms": first * 1e3,
            "next ms": middle * 1e3,
            "p5": low * 1e3,
            "p95": high * 1e3,
            "tok/s": batch * len(steps) / sum(steps),
            "of bandwidth": self._moved(prompt, batch) / middle / self.ceiling.read,
            "of products": 2 * self.used * prompt * batch / first / self.ceiling.float32,
        }

    def _moved(self, prompt: int, batch: int) -> float:
        return self.read + batch * self.kv_token * (prompt + NEW / 2)


Cases = list[tuple[int, int]]  # prompt, batch


def offline(engine: Engine, cases: Cases, load: Load) -> Iterator[dict[str, Any]]:
    token_times(engine, 8, 1)
    for prompt, batch in tqdm(cases, desc="offline", disable=None, leave=False):
        yield load.row(prompt, batch, *token_times(engine, prompt, batch))


async def over_http(options: Namespace, cases: Cases, load: Load) -> list[dict[str, Any]]:
    vocabulary, rows = clients.vocabulary(options.model), []
    chance = np.random.default_rng(0)
    async with served(options, *clients.flags(options)) as server:
        await clients.ask(server.port, [5] * 8, NEW)
        for prompt, batch in tqdm(cases, desc="http", disable=None, leave=False):
            asked = chance.integers(1, vocabulary - 1, (batch, prompt)).tolist()
            answers = await clients.closed(server.port, asked, NEW + 1, batch)
            gaps = [gap for answer in answers for gap in answer.gaps]
            rows.append(load.row(prompt, batch, max(answer.first for answer in answers), gaps))
    return rows


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", nargs="?", help="a folder or hub name; nothing: the embedded one")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 256, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--over", nargs="+", choices=["offline", "http"], default=["offline", "http"]
    )
    parser.add_argument("--quantize", choices=["none", *FORMATS], default="none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or cores())
    ceiling = limits.measure(3)
    engine = Engine(
        options.model, threads=options.threads, quantize=options.quantize, prefix_cache=False
    )
    ready = engine.parts.ready
    kv_token = Cache.page_bytes(ready.config, 1, ready.runner.cache.pages.dtype)
    load = Load(*weights(engine), kv_token, ceiling)
    longest = engine.info["context"] - NEW - 1
    cases = [(p, b) for p in options.prompts for b in options.batches if p <= longest]
    rows: list[harness.Row] = []
    if "offline" in options.over:
        rows += [{"over": "offline"} | row for row in offline(engine, cases, load)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    about = {name: engine.info[name] for name in ("model", "parameters", "dtype", "quantize")}
    del engine, ready  # its memory, before the server's
    if "http" in options.over:
        found = asyncio.run(over_http(options, cases, load))
        rows += [{"over": "http"} | row for row in found]
    lines = {
        f"batch {batch}, {way}": _line(rows, way, batch)
        for way in options.over
        for batch in options.batches
    }
    harness.plot(options.plot, "Time per token", "tokens of context", "ms", lines)
    harness.finish("latency", rows, options, about=about, peak=peak, limits=asdict(ceiling))


def _line(rows: list[harness.Row], way: str, batch: int) -> tuple[list[float], list[float]]:
    here = [row for row in rows if (row["over"], row["batch"]) == (way, batch)]
    return [float(row["prompt"]) for row in here], [float(row["next ms"]) for row in here]


if __name__ == "__main__":
    main()
