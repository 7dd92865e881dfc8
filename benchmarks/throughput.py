"""Tokens a second, over how many ask at once, and over how often they come.

    python -m benchmarks.throughput [MODEL] [--clients 1 4 16 64 256] [--rates 2 8] [--over http]

`clients` ask again as soon as they are answered (closed loop); `rates` are requests a second that
come when they come (open loop): Poisson, and in bursts of 8. Every request is 32 tokens after a
prompt of its own; a second pass lets all prompts share their first half, with the prefix cache on.
Goodput counts the requests whose first token came within the target. `offline` is the engine in
this process, `http` a server on loopback with its clients here.
"""

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import clients, harness
from benchmarks.served import served
from model.quantize import FORMATS
from model.sampling import Sampling
from server import Engine
from server.engine.request import Request

PROMPT, NEW = 64, 32
TARGET = 0.5  # seconds to the first token
BURST = 8
Load = tuple[str, int, Sequence[float] | None]  # its name, clients or requests, when they come


def loads(options: Namespace) -> list[Load]:
    found: list[Load] = [(f"{count} clients", count, None) for count in options.clients]
    for rate in options.rates:
        for burst, name in ((1, "a second"), (BURST, "a second, bursts")):
            count = max(int(4 * rate), BURST)
            found.append((f"{rate:g} {name}", count, arrivals(rate, count, burst)))
    return found


def arrivals(rate: float, count: int, burst: int) -> list[float]:
    """Seconds at which `count` requests come, `burst` at a time, `rate` a second on average."""
    gaps = np.random.default_rng(2).exponential(burst / rate, -(-count // burst))
    return np.repeat(np.cumsum(gaps), burst)[:count].tolist()


def prompts(vocabulary: int, count: int, shared: bool, seed: int) -> list[list[int]]:
    """Of random ids; `seed` makes each load's new to a cache, all but a `shared` beginning."""
    found = np.random.default_rng(seed).integers(1, vocabulary - 1, (count, PROMPT))
    if shared:
        found[:, : PROMPT // 2] = np.random.default_rng(0).integers(1, vocabulary - 1, PROMPT // 2)
    return found.tolist()


class Crowd:
    """Requests to the engine of this process, with a clock on each."""

    def __init__(self, engine: Engine, asked: list[list[int]]) -> None:
        self.engine, self.asked = engine, asked
        self.began: list[float] = []
        self.first: dict[str, float] = {}
        self.tokens = self.done = 0

    def ask(self) -> None:
        number = len(self.began)
        greedy, name = Sampling(temperature=0), str(number)
        self.began.append(time.perf_counter())
        self.engine.submit(
            Request(id=name, prompt=self.asked[number], max_tokens=NEW, sampling=greedy)
        )

    def step(self) -> None:
        for event in self.engine.step():
            self.tokens += sum(len(choice.tokens) for choice in event.choices)
            self.first.setdefault(event.id, time.perf_counter())
            self.done += event.done

    def run(self, count: int, due: Sequence[float] | None) -> None:
        """`count` clients at a time, or each when it is due."""
        start = time.perf_counter()
        while self.done < len(self.asked):
            while len(self.began) < len(self.asked) and (
                len(self.began) - self.done < count
                if due is None
                else time.perf_counter() - start >= due[len(self.began)]
            ):
                self.ask()
            self.step()

    def waits(self) -> list[float]:
        return [self.first[str(number)] - began for number, began in enumerate(self.began)]


def offline(options: Namespace, shared: bool) -> Iterator[dict[str, Any]]:
    engine = Engine(
        options.model, threads=options.threads, quantize=options.quantize, prefix_cache=shared
    )
    vocabulary = engine.parts.ready.config.vocabulary
    Crowd(engine, prompts(vocabulary, 1, shared, 99)).run(1, None)
    for seed, (name, count, due) in enumerate(loads(options)):
        crowd = Crowd(engine, prompts(vocabulary, total(count, due), shared, 100 + seed))
        began = time.perf_counter()
        crowd.run(count, due)
        yield {"load": name} | told(crowd.tokens, crowd.waits(), time.perf_counter() - began)


async def over_http(options: Namespace, shared: bool) -> list[dict[str, Any]]:
    vocabulary, rows = clients.vocabulary(options.model), []
    async with served(options, *clients.flags(options, shared)) as server:
        await clients.ask(server.port, prompts(vocabulary, 1, shared, 99)[0], NEW)
        for seed, (name, count, due) in enumerate(loads(options)):
            asked = prompts(vocabulary, total(count, due), shared, 100 + seed)
            began = time.perf_counter()
            if due is None:
                answers = await clients.closed(server.port, asked, NEW, count)
            else:
                answers = await clients.opened(server.port, asked, NEW, due)
            seconds = time.perf_counter() - began
            tokens = sum(answer.tokens for answer in answers)
            waits = [answer.first for answer in answers]
            rows.append({"load": name} | told(tokens, waits, seconds))
    return rows


def total(count: int, due: Sequence[float] | None) -> int:
    """Requests: each client asks twice or more."""
    return max(2 * count, 8) if due is None else count


def told(tokens: int, waits: Sequence[float], seconds: float) -> dict[str, float]:
    middle, late = np.percentile(waits, [50, 99]) * 1e3
    return {
        "requests": len(waits),
        "tok/s": tokens / seconds,
        "first p50 ms": float(middle),
        "first p99 ms": float(late),
        "goodput/s": sum(wait <= TARGET for wait in waits) / seconds,
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", nargs="?", help="a folder or hub name; nothing: the embedded one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0])
    parser.add_argument(
        "--over", nargs="+", choices=["offline", "http"], default=["offline", "http"]
    )
    parser.add_argument("--quantize", choices=["none", *FORMATS], default="none")
    options = parser.parse_args()
    rows: list[harness.Row] = []
    passes = [(way, shared) for way in options.over for shared in (False, True)]
    for way, shared in tqdm(passes, desc="throughput", disable=None, leave=False):
        prefix = {"over": way, "prefix": "shared" if shared else "own"}
        found = (
            offline(options, shared)
            if way == "offline"
            else asyncio.run(over_http(options, shared))
        )
        rows += [prefix | row for row in found]
    lines = {
        f"{way}, {prefix} prefix": _line(rows, way, prefix, options.clients)
        for way in options.over
        for prefix in ("own", "shared")
    }
    harness.plot(options.plot, "Throughput", "clients", "tokens/s", lines)
    kept = {name: ys[-1] / max(ys) for name, (_, ys) in lines.items()}
    harness.finish(
        "throughput", rows, options, prompt=PROMPT, new=NEW, target=TARGET, last_of_best=kept
    )


def _line(
    rows: Sequence[harness.Row], way: str, prefix: str, counts: Sequence[int]
) -> tuple[list[float], list[float]]:
    speeds = [row["tok/s"] for row in rows if (row["over"], row["prefix"]) == (way, prefix)]
    return [float(count) for count in counts], speeds[: len(counts)]


if __name__ == "__main__":
    main()
