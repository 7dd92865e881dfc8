"""Tokens a second, over how many ask at once, and over how often they come.

    python -m benchmarks.throughput [MODEL] [--clients 1 4 16 64] [--rates 2 8]

`clients` ask again as soon as they are answered (closed loop); `rates` are requests a second that
come when they come (open loop, Poisson). Every request is 32 tokens after a prompt of its own; a
second pass lets all prompts share their first half, with the prefix cache on. Goodput counts the
requests whose first token came within the target.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks import harness
from model.quantize import FORMATS
from model.sampling import Sampling
from server import Engine
from server.engine.request import Request

PROMPT, NEW = 64, 32
TARGET = 0.5  # seconds to the first token


class Crowd:
    """Requests with a clock on each."""

    def __init__(self, engine: Engine, shared: bool) -> None:
        self.engine, self.chance = engine, np.random.default_rng(1)
        self.vocabulary = engine.parts.ready.config.vocabulary
        self.beginning = self._ids(PROMPT // 2) if shared else []
        self.asked: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.tokens = 0
        self.done = 0

    def _ids(self, count: int) -> list[int]:
        return self.chance.integers(1, self.vocabulary - 1, count).tolist()

    def ask(self) -> None:
        name = f"{len(self.asked)}-{time.monotonic_ns()}"
        ids = self.beginning + self._ids(PROMPT - len(self.beginning))
        greedy = Sampling(temperature=0)
        self.asked[name] = time.perf_counter()
        self.engine.submit(Request(id=name, prompt=ids, max_tokens=NEW, sampling=greedy))

    def step(self) -> None:
        for event in self.engine.step():
            self.tokens += sum(len(choice.tokens) for choice in event.choices)
            self.first.setdefault(event.id, time.perf_counter())
            self.done += event.done

    def waits(self) -> list[float]:
        return [self.first[name] - asked for name, asked in self.asked.items()]


def closed(crowd: Crowd, clients: int, total: int) -> float:
    """Seconds until `total` requests are answered, `clients` at a time."""
    began = time.perf_counter()
    while crowd.done < total:
        while len(crowd.asked) < total and len(crowd.asked) - crowd.done < clients:
            crowd.ask()
        crowd.step()
    return time.perf_counter() - began


def opened(crowd: Crowd, rate: float, total: int) -> float:
    """Seconds until `total` requests are answered that come at `rate` a second on average."""
    due = iter(np.cumsum(crowd.chance.exponential(1 / rate, total)).tolist())
    began, following = time.perf_counter(), next(due)
    while crowd.done < total:
        while following is not None and time.perf_counter() - began >= following:
            crowd.ask()
            following = next(due, None)
        crowd.step()
    return time.perf_counter() - began


def cases(options: Namespace) -> Iterator[tuple[str, Callable[[Crowd], float], int]]:
    for clients in options.clients:
        total = max(2 * clients, 8)
        yield f"{clients} clients", partial(closed, clients=clients, total=total), total
    for rate in options.rates:
        total = max(int(4 * rate), 8)
        yield f"{rate:g} a second", partial(opened, rate=rate, total=total), total


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", nargs="?", help="a folder or hub name; nothing: the embedded one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0])
    parser.add_argument("--quantize", choices=["none", *FORMATS], default="none")
    options = parser.parse_args()
    rows: list[harness.Row] = []
    for shared in (False, True):
        engine = Engine(
            options.model, threads=options.threads, quantize=options.quantize, prefix_cache=shared
        )
        closed(Crowd(engine, shared), 1, 1)
        for name, run, total in cases(options):
            crowd = Crowd(engine, shared)
            seconds = run(crowd)
            waits = crowd.waits()
            middle, late = np.percentile(waits, [50, 99]) * 1e3
            rows.append(
                {
                    "load": name,
                    "prefix": "shared" if shared else "own",
                    "requests": total,
                    "tok/s": crowd.tokens / seconds,
                    "first p50 ms": float(middle),
                    "first p99 ms": float(late),
                    "goodput/s": sum(wait <= TARGET for wait in waits) / seconds,
                }
            )
    half = len(options.clients)
    lines = {
        prefix: (
            [float(n) for n in options.clients],
            [float(row["tok/s"]) for row in rows if row["prefix"] == prefix][:half],
        )
        for prefix in ("own", "shared")
    }
    harness.plot(options.plot, "Throughput", "clients", "tokens/s", lines)
    harness.finish("throughput", rows, options, prompt=PROMPT, new=NEW, target=TARGET)


if __name__ == "__main__":
    main()
