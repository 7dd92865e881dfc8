"""Kvist beside other engines, in one run: the same noise, in each one's own format, the same work.

    python -m benchmarks.compare [--shape llama-0.5b] [--precisions int8 float32] [--threads 1 2]
    python -m benchmarks.compare --check        do they compute the same?

Engines are those of `benchmarks/peers` that are installed (`pip install kvist[bench-peers]`); one
that is not, or fails, is listed with its reason. Each has a process of its own, stopped while
others work; all take turns in every round. `ratio` is Kvist's speed over the other's, the median
over rounds; `of limit` is the share of what this machine's memory and units allow, measured in
this run. Kvist is its offline engine. Decode is the time of 128 tokens without that of the first.
"""

import itertools
import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness, limits
from benchmarks.peers import PEERS, Work
from benchmarks.peers.picture import draw
from benchmarks.peers.remote import Failed, Remote, convert, source
from benchmarks.peers.source import SHAPES, weights
from model.device import free_memory

WORKS = {
    "decode": Work(1, 128, 128),
    "8 streams": Work(8, 128, 128),
    "16 streams": Work(16, 128, 128),
    "prefill": Work(1, 1024, 1),
    "beam 4": Work(1, 128, 64, beams=4),
}
WITHOUT_FIRST = "decode"  # the case that counts what comes after the first token
BYTES = {"float32": 4.0, "F32": 4.0, "int8": 1.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}  # of a weight
ROOM = 0.7  # of the free memory, for engines that stay; else each leaves after its turn


@dataclass
class Seat:
    """An engine's place in the contest, and what it has shown."""

    engine: str
    form: str
    folder: Path
    threads: int
    vocabulary: int
    taken: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # case: wall, CPU
    why: dict[str, str] = field(default_factory=dict)  # case: the reason that it has no number
    remote: Remote | None = None
    peak: int = 0

    @property
    def name(self) -> str:
        plain = self.form in ("float32", "int8", "F32")
        return self.engine if plain else f"{self.engine} {self.form}"

    def turn(self, case: str, work: Work, counts: bool, patience: float) -> None:
        if case in self.why:
            return
        try:
            wall, cpu = self._ask(work, patience)
            if case == WITHOUT_FIRST:
                first, first_cpu = self._ask(replace(work, new=1), patience)
                wall, cpu = wall - first, cpu - first_cpu
        except Failed as reason:
            self.why[case] = str(reason)
            return
        if counts:
            self.taken.setdefault(case, []).append((wall, cpu))

    def _ask(self, work: Work, patience: float) -> tuple[float, float]:
        if self.remote is None or not self.remote.alive:
            self.remote = Remote(self.engine, self.form, self.folder, self.threads, self.vocabulary)
        answer = self.remote.ask(work, patience)
        self.peak = max(self.peak, self.remote.peak)
        return answer["wall"], answer["cpu"]

    def leave(self) -> None:
        if self.remote is not None:
            self.remote.close()


def seats(given: Namespace, precision: str, threads: int, work: Path) -> Iterator[Seat]:
    """Everyone who is here and can write its format; `given.missing` gets the others."""
    words = SHAPES[given.shape]["vocabulary"]
    here = source(given.shape, work)
    for engine in given.engines:
        entry = PEERS[engine]
        try:
            metadata.version(entry.package)
            if precision not in entry.forms:
                raise Failed(f"it has no {precision} here")
            for form in entry.forms[precision]:
                yield Seat(engine, form, convert(engine, here, form, work), threads, words)
        except metadata.PackageNotFoundError:
            given.missing[engine] = f"{entry.package} is not installed"
        except Failed as reason:
            given.missing[f"{engine} {precision}"] = str(reason)


def contest(given: Namespace, rivals: list[Seat]) -> None:
    """All cases of one precision and thread count."""
    size = sum(BYTES[seat.form] * weights(SHAPES[given.shape]) for seat in rivals)
    stay = 2 * size < ROOM * free_memory(torch.device("cpu"))
    cases = [(name, fit(work, given)) for name, work in WORKS.items() if name in given.cases]
    with tqdm(total=(given.rounds + 1) * len(cases) * len(rivals), disable=None) as bar:
        for number in range(given.rounds + 1):
            order = rivals[number % len(rivals) :] + rivals[: number % len(rivals)]
            turns = [(case, seat) for case, seat in itertools.product(cases, order)]
            for (name, work), seat in turns if stay else sorted(turns, key=lambda t: t[1].name):
                bar.set_description(f"{seat.name}: {name}")
                warm = replace(work, new=min(work.new, 8)) if number == 0 else work
                seat.turn(name, replace(warm, seed=number), number > 0, given.patience)
                bar.update()
                if not stay and name == cases[-1][0]:
                    seat.leave()
    for seat in rivals:
        seat.leave()


def fit(work: Work, given: Namespace) -> Work:
    """In the network's context, and made shorter for a rehearsal."""
    work = replace(work, new=max(work.new // given.shorter, 1), prompt=work.prompt // given.shorter)
    return replace(work, prompt=min(work.prompt, SHAPES[given.shape]["context"] - work.new))


def least(work: Work, form: str, shape: dict[str, Any], ceiling: limits.Limits) -> float:
    """Seconds that reading the weights, keys and values, or the products take at the least."""
    layers, head = weights(shape), shape["vocabulary"] * shape["hidden"]
    rate = ceiling.float32 if BYTES[form] == 4 else ceiling.int8 or ceiling.float32
    read = BYTES[form] * (layers + head) / ceiling.read
    seen = work.prompt + work.new / 2
    width = shape["hidden"] // shape["heads"] * shape["kv_heads"]
    kept = 4 * 2 * shape["layers"] * width * seen / ceiling.read  # of one row
    rows = work.streams * work.beams
    prompt = max(read, 2 * work.streams * (layers * work.prompt + head) / rate)
    step = max(read + rows * kept, 2 * rows * (layers + head) / rate)
    return prompt + (work.new - 1) * step


def shown(seat: Seat, best: Seat | None, given: Namespace, ceiling: limits.Limits) -> Iterator[Any]:
    """A row a case."""
    for case, work in WORKS.items():
        if case not in given.cases:
            continue
        work = fit(work, given)
        row = {"case": case, "threads": seat.threads, "engine": seat.name}
        if case in seat.why or case not in seat.taken:
            yield row | {"note": seat.why.get(case, "it was not measured")}
            continue
        walls = [wall for wall, _ in seat.taken[case]]
        after = work.new - (case == WITHOUT_FIRST)
        tokens = work.streams * (work.prompt if work.new == 1 else after)
        lowest = least(work, seat.form, SHAPES[given.shape], ceiling)
        if case == WITHOUT_FIRST:
            lowest -= least(replace(work, new=1), seat.form, SHAPES[given.shape], ceiling)
        middle = statistics.median(walls)
        yield row | {
            "tok/s": tokens / middle,
            "spread": spread(walls),
            "of limit": lowest / middle,
            "cpu s": statistics.median(cpu for _, cpu in seat.taken[case]),
            **_against(seat, best, case),
            "peak MB": seat.peak >> 20,
        }


def _against(seat: Seat, best: Seat | None, case: str) -> dict[str, float]:
    """Round by round, since what disturbs one round disturbs both."""
    if best is None or seat is best or case not in best.taken:
        return {}
    pairs = zip(seat.taken[case], best.taken[case])
    ratios = [theirs / ours for (theirs, _), (ours, _) in pairs]
    return {"ratio": statistics.median(ratios), "± ratio": spread(ratios)}


def spread(values: list[float]) -> float:
    return harness.Times(values, [], 0).spread


def main() -> None:
    given = options()
    given.missing = {}
    rows: list[harness.Row] = []
    ceilings: dict[int, limits.Limits] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)) / given.shape
        if given.check:
            from benchmarks.peers.check import check

            sys.exit(check(given, work))
        for threads, precision in itertools.product(given.threads, given.precisions):
            torch.set_num_threads(threads)
            if threads not in ceilings:
                ceilings[threads] = limits.measure(3)
            rivals = list(seats(given, precision, threads, work))
            contest(given, rivals)
            ours = next((seat for seat in rivals if seat.engine == "kvist"), None)
            for seat in rivals:
                found = shown(seat, ours, given, ceilings[threads])
                rows += [{"precision": precision, **row} for row in found]
    finish(given, rows, ceilings)


def finish(given: Namespace, rows: list[harness.Row], ceilings: dict[int, limits.Limits]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)  # those that failed have fewer
    rows = sorted(rows, key=lambda row: (row["threads"], row["precision"], _place(row["case"])))
    rows = [{name: row.get(name) for name in columns} for row in rows]
    draw(given.plot, given.shape, rows)
    for name, why in given.missing.items():
        print(f"{name}: {why}")
    harness.finish(
        "compare", rows, given, shape=given.shape, rounds=given.rounds, missing=given.missing,
        versions={entry.package: harness._version(entry.package) for entry in PEERS.values()},
        limits={threads: asdict(ceiling) for threads, ceiling in ceilings.items()},
        disturbed=max((row.get("spread") or 0 for row in rows), default=0) > 0.15,
    )  # fmt: skip


def _place(case: str) -> int:
    return list(WORKS).index(case)


def options() -> Namespace:
    parser = harness.parser(__doc__)
    add = parser.add_argument
    parser.set_defaults(threads=[len(os.sched_getaffinity(0))])
    next(a for a in parser._actions if a.dest == "threads").nargs = "+"
    add("--shape", choices=SHAPES, default="llama-0.5b")
    add("--precisions", nargs="+", choices=["int8", "float32"], default=["int8", "float32"])
    add("--cases", nargs="+", choices=WORKS, default=list(WORKS))
    add("--engines", nargs="+", choices=PEERS, default=list(PEERS))
    add("--rounds", type=int, default=3)
    add("--work", type=Path, help="a folder that keeps what was written, for the next run")
    add("--patience", type=float, default=600, help="seconds for one answer")
    add("--shorter", type=int, default=1, help="divide prompts and outputs: a rehearsal")
    add("--check", action="store_true", help="compare greedy tokens instead of speed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
