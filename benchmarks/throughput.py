"""Tokens a second, over how many ask at once, and over how often they come.

    python -m benchmarks.throughput [MODEL] [--clients 1 4 16 64 256 512] [--shares 0.3 0.6 0.9]

`clients` ask again as soon as they are answered (closed loop). Then requests come when they come
(open loop), Poisson and in bursts of 8, at a share of the requests a second that the fastest of the
clients got. Every request is 32 tokens after a prompt of its own; a second pass lets all prompts
share their first half, with the prefix cache on. All loads take turns in every round. Goodput
counts the requests whose first token came in time, and the others on average. `offline` is the
engine in this process, `http` a server on loopback with its clients here. CPU time is the engine's,
and over HTTP the whole server's.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import harness, limits, ways
from benchmarks.clients import Answer, Prompt
from benchmarks.ways import WAYS, About, Way
from model.device import cores

BURST = 8
FEWEST = 32  # requests of a load
PREFIX = ("own", "shared")
Words = Callable[[int, int], list[Prompt]]  # so many, of a seed


@dataclass
class Load:
    """One row: what was asked, and what came of it in each round."""

    name: str
    clients: int = 0  # closed loop
    share: float = 0.0  # open loop: of the requests a second that clients at their best got …
    burst: int = 1  # … and so many at a time
    rate: float = 0.0  # which is so many a second
    answers: list[Answer] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens/s

    def turn(self, options: Namespace, way: Way, words: Words, seed: int) -> None:
        due = arrivals(self.rate, options.seconds, self.burst, seed) if self.rate else []
        prompts = words(len(due) or max(2 * self.clients, FEWEST), seed)
        crowd, before = way.crowd(prompts, options.new), way.computed()
        answers = crowd.run(self.clients, due)
        self.cpu.append(way.computed() - before)
        self.seconds.append(crowd.seconds)
        self.answers += answers
        self.speeds.append(sum(answer.tokens for answer in answers) / crowd.seconds)

    def row(self, options: Namespace) -> dict[str, Any]:
        firsts = np.percentile([answer.first for answer in self.answers], [50, 99]) * 1e3
        paces = np.percentile([answer.pace for answer in self.answers], [50, 99]) * 1e3
        good = sum(self._good(answer, options) for answer in self.answers)
        tokens = sum(answer.tokens for answer in self.answers)
        return {
            "load": self.name,
            "asked/s": self.rate or None,
            "requests": len(self.answers),
            "tok/s": median(self.speeds),
            "spread": harness.Times(self.speeds, [], 0).spread,
            "cpu µs/token": sum(self.cpu) / tokens * 1e6,
            "first p50 ms": float(firsts[0]),
            "first p99": float(firsts[1]),
            "next p50 ms": float(paces[0]),
            "next p99": float(paces[1]),
            "done/s": len(self.answers) / sum(self.seconds),
            "goodput/s": good / sum(self.seconds),
        }

    def _good(self, answer: Answer, options: Namespace) -> bool:
        return answer.first <= options.first and answer.pace <= options.next


def loads(options: Namespace) -> list[Load]:
    """Those of the closed loop first: the others' rates come from them."""
    found = [Load(f"{count} clients", clients=count) for count in options.clients]
    for share in options.shares:
        found.append(Load(f"{share:.0%} Poisson", share=share))
        found.append(Load(f"{share:.0%} bursts of {BURST}", share=share, burst=BURST))
    return found


def contest(options: Namespace, way: Way, words: Words) -> list[Load]:
    """All loads, so many rounds."""
    way.crowd(words(2, 0), options.new).run(1)  # warm
    rivals = loads(options)
    turns = [load for _ in range(options.rounds) for load in rivals]
    for seed, load in enumerate(tqdm(turns, desc="loads", disable=None, leave=False), 1):
        if load.share and not load.rate:
            best = max(rival.speeds[0] for rival in rivals if rival.clients)
            load.rate = load.share * best / options.new
        load.turn(options, way, words, seed)
    return rivals


def arrivals(rate: float, seconds: float, burst: int, seed: int) -> list[float]:
    """Moments at which requests come, `burst` at a time, `rate` a second on average."""
    count = max(round(rate * seconds / burst), 1)
    gaps = np.random.default_rng(seed).exponential(burst / rate, count)
    return np.repeat(np.cumsum(gaps), burst).tolist()


def draw(words: int, length: int, shared: bool, count: int, seed: int) -> list[Prompt]:
    """Of random ids; `seed` makes each load's new to a cache, all but a `shared` beginning."""
    found = np.random.default_rng([1, seed]).integers(1, words - 1, (count, length))
    if shared:
        found[:, : length // 2] = np.random.default_rng(0).integers(1, words - 1, length // 2)
    return found.tolist()


def main() -> None:
    options = asked()
    threads = options.threads or cores()
    about, ceiling = About.of(options), limits.measure(7, threads)
    passes = [(name, shared) for name in options.over for shared in (False, True)]
    rows: list[harness.Row] = []
    for name, shared in tqdm(passes, desc="throughput", disable=None, leave=False):
        drawn = partial(draw, about.vocabulary, options.prompt, shared)
        with WAYS[name](options, shared) as way:
            for one in contest(options, way, drawn):
                row = {"over": name, "prefix": PREFIX[shared]} | one.row(options)
                rows.append(row | {"of limit": _of_limit(one, about, ceiling, options)})
    lines = {
        f"{way}, {PREFIX[shared]} prefix": _line(rows, way, shared, options.clients)
        for way, shared in passes
    }
    harness.plot(options.plot, "Throughput", "clients", "tokens/s", lines)
    harness.finish(
        "throughput", rows, options, about=about.facts, limits=asdict(ceiling),
        rounds=options.rounds, threads=threads, prompt=options.prompt, new=options.new,
        said=[str(about), *told(options, lines)],
        disturbed=max(row["spread"] for row in rows if not row["asked/s"]) > 0.15,
    )  # fmt: skip


def _of_limit(load: Load, about: About, ceiling: limits.Limits, options: Namespace) -> float | None:
    """The share of what the memory and the units allow; of the closed loop only."""
    if not load.clients:
        return None
    rows = min(load.clients, about.seats)
    least = about.costs.whole(ceiling, rows, options.prompt, options.new)
    return median(load.speeds) * least / (rows * options.new)


Line = tuple[list[float], list[float]]


def _line(rows: Sequence[harness.Row], way: str, shared: bool, counts: Sequence[int]) -> Line:
    here = (way, PREFIX[shared])
    speeds = [row["tok/s"] for row in rows if (row["over"], row["prefix"]) == here]
    return [float(count) for count in counts], speeds[: len(counts)]


def told(options: Namespace, lines: dict[str, Line]) -> Iterator[str]:
    """What the rows say about what was promised."""
    yield (
        f"Prompts of {options.prompt} tokens, answers of {options.new}. Goodput: the first token "
        f"within {options.first:g} s, the others {options.next * 1e3:g} ms apart on average."
    )
    for name, (counts, speeds) in lines.items():
        top = speeds.index(max(speeds))
        low = min(speeds[top:])
        at = counts[speeds.index(low, top)]
        more = f"with more at least {low / speeds[top]:.2f} of it ({at:.0f} clients)"
        yield (
            f"{name}: {speeds[top]:,.0f} tokens/s at its best, with {counts[top]:.0f} clients; "
            f"{more if speeds[top + 1 :] else 'more were not asked for'}."
        )


def asked() -> Namespace:
    parser = harness.parser(__doc__)
    ways.add_flags(parser)
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[1, 4, 16, 64, 256, 512])
    add("--shares", type=float, nargs="*", default=[0.3, 0.6, 0.9], help="of the fastest clients")
    add("--seconds", type=float, default=5, help="of a load of the open loop")
    add("--prompt", type=int, default=64, help="tokens")
    add("--new", type=int, default=32, help="tokens")
    add("--first", type=float, default=0.5, help="seconds to the first token that are good")
    add("--next", type=float, default=0.05, help="seconds from token to token that are good")
    return parser.parse_args()


if __name__ == "__main__":
    main()
