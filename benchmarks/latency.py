"""How long a token takes: the first, over the prompt's length; the next, over context and batch.

    python -m benchmarks.latency [MODEL] [--prompts 16 256 768] [--batches 1 4 16] [--over http]

`offline` is the engine in this process; `http` a server on loopback, and as many clients here as
the batch has rows, who ask at once. Percentiles over requests and tokens of all rounds, not means;
`next` counts while all rows decode and no prompt is left. The last columns are the share of the
machine's limits that was reached: bytes of weights and of keys and values that a step reads against
what the memory gave beside that very turn (the median over turns), and operations of prompts
against the rate of products.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import harness, limits, ways
from benchmarks.costs import Costs
from benchmarks.limits import Limits, Memory
from benchmarks.ways import WAYS, About, Way
from model.device import cores

NEW = 32  # tokens of each row, at least, while all decode


@dataclass
class Case:
    """Rows that ask at once, with prompts of one length; and what they waited for."""

    prompt: int
    batch: int
    chunks: int  # steps that their prompts take
    firsts: list[float] = field(default_factory=list)
    alls: list[float] = field(default_factory=list)  # until the last row had its first
    gaps: list[float] = field(default_factory=list)
    middles: list[float] = field(default_factory=list)  # of each turn's gaps
    reads: list[float] = field(default_factory=list)  # bytes/s, beside each turn
    cpu: float = 0.0

    @property
    def new(self) -> int:
        """Whoever is first still decodes for so long after the last has begun."""
        return NEW + self.chunks + 1

    def turn(self, way: Way, words: int, seed: int) -> None:
        shape = (self.batch, self.prompt)
        prompts = np.random.default_rng(seed).integers(1, words - 1, shape).tolist()
        crowd, before = way.crowd(prompts, self.new), way.computed()
        answers = crowd.run(self.batch)
        self.cpu += way.computed() - before
        self.firsts += [answer.first for answer in answers]
        begun = max(answer.at[0] for answer in answers)
        self.alls.append(begun)
        ended = min(answer.at[-1] for answer in answers)
        gaps = [gap for answer in answers for gap in answer.gaps(begun, ended)]
        self.middles.append(float(np.median(gaps)))
        self.gaps += gaps

    def row(self, costs: Costs, ceiling: Limits) -> dict[str, Any]:
        firsts = np.percentile(self.firsts, [50, 95]) * 1e3
        gaps = np.percentile(self.gaps, [5, 50, 95, 99]) * 1e3
        moved = costs.read(self.batch, self.prompt + self.new / 2)
        worked = costs.work(self.batch, self.prompt)
        tokens = self.batch * self.new * len(self.alls)
        return {
            "prompt": self.prompt,
            "batch": self.batch,
            "first p50 ms": float(firsts[0]),
            "first p95": float(firsts[1]),
            "next p50 ms": float(gaps[1]),
            "next p5": float(gaps[0]),
            "next p95": float(gaps[2]),
            "next p99": float(gaps[3]),
            "tok/s": self.batch / gaps[1] * 1e3,
            "cpu ms/token": self.cpu / tokens * 1e3,
            "of bandwidth": float(np.median(moved / np.multiply(self.middles, self.reads))),
            "of products": worked / float(np.median(self.alls)) / costs.rate(ceiling),
        }


def cases(options: Namespace, about: About) -> Iterator[Case]:
    for prompt in options.prompts:
        for batch in options.batches:
            case = Case(prompt, batch, -(-prompt * batch // about.step_tokens))
            if prompt + case.new <= about.context:
                yield case


def contest(options: Namespace, way: Way, about: About, memory: Memory) -> list[Case]:
    """All cases, so many rounds."""
    way.crowd([[5] * 8], 4).run(1)  # warm
    found = list(cases(options, about))
    turns = [case for _ in range(options.rounds) for case in found]
    for seed, case in enumerate(tqdm(turns, desc="cases", disable=None, leave=False)):
        with memory.beside(case.reads):
            case.turn(way, about.vocabulary, seed)
    return found


def main() -> None:
    options = asked()
    threads = options.threads or cores()
    about, found, peaks = About.of(options), {}, {}
    with Memory(threads) as memory:
        for name in options.over:
            with WAYS[name](options) as way:
                found[name] = contest(options, way, about, memory)
                peaks[name] = way.peak()
    ceiling = memory.seen(limits.measure(7, threads))  # last: it takes a gigabyte
    rows = [
        {"over": name} | case.row(about.costs, ceiling)
        for name, some in found.items()
        for case in some
    ]
    said = [f"{name}: {peak / 1e6:,.0f} MB of memory at the most." for name, peak in peaks.items()]
    harness.plot(options.plot, "Time per token", "tokens of context", "ms", dict(lines(rows)))
    harness.finish(
        "latency", rows, options, about=about.facts, peak=peaks, limits=asdict(ceiling),
        rounds=options.rounds, threads=threads, said=[str(about), *said],
    )  # fmt: skip


Line = tuple[list[float], list[float]]


def lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Line]]:
    for over, batch in dict.fromkeys((row["over"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["over"], row["batch"]) == (over, batch)]
        xs = [float(row["prompt"]) for row in here]
        yield f"batch {batch}, {over}", (xs, [row["next p50 ms"] for row in here])


def asked() -> Namespace:
    parser = harness.parser(__doc__)
    ways.add_flags(parser)
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 256, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    return parser.parse_args()


if __name__ == "__main__":
    main()
