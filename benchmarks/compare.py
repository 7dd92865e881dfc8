"""Kvist beside other engines, in one run: the same noise, in each one's own format, the same work.

    python -m benchmarks.compare [--shape llama-0.5b] [--precisions int4 int8] [--threads 1 2]
    python -m benchmarks.compare --check        do they compute the same?

Engines are those of `benchmarks/peers` that are installed (`pip install kvist[bench-peers]`); one
that is not, or fails, is listed with its reason. Each has a process of its own, stopped while
others work; all take turns in every round. `ratio` is Kvist's speed over the other's, the median
over rounds; `of limit` is the share of what this machine's units allow, measured in this run, and
its memory, measured beside each turn. Kvist is its offline engine. Decode is the time of 128 tokens
without that of the first. A source is stored as real ones of its shape are. In float32, Kvist keeps
weights that are stored in bfloat16 as they are, and computes the same: its limit is their bytes.
"""

import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, limits
from benchmarks.peers import PEERS, PRECISIONS, Work
from benchmarks.peers.contest import BYTES, WITHOUT_FIRST, Seat, contest, least
from benchmarks.peers.picture import draw
from benchmarks.peers.remote import Failed, convert, source
from benchmarks.peers.source import SHAPES, weights
from model.device import free_memory

WORKS = {
    "decode": Work(1, 128, 128),
    "8 streams": Work(8, 128, 128),
    "16 streams": Work(16, 128, 128),
    "prefill": Work(1, 1024, 1),
    "beam 4": Work(1, 128, 64, beams=4),
}
ROOM = 0.7  # of the free memory, for engines that stay; else each leaves after its turn


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
                if form == "BF16" and SHAPES[given.shape]["stored"] != "bfloat16":
                    continue  # it would round what others read
                yield Seat(engine, form, convert(engine, here, form, work), threads, words)
        except metadata.PackageNotFoundError:
            given.missing[engine] = f"{entry.package} is not installed"
        except Failed as reason:
            given.missing[f"{engine} {precision}"] = str(reason)


def fits(given: Namespace, rivals: list[Seat]) -> bool:
    """Whether all can stay in memory at once; some keep their weights twice."""
    shape = SHAPES[given.shape]
    count = weights(shape) + shape["vocabulary"] * shape["hidden"]
    size = sum(BYTES[seat.form] * count for seat in rivals)
    return 2 * size < ROOM * free_memory(torch.device("cpu"))


def chosen(given: Namespace) -> dict[str, Work]:
    return {case: fit(WORKS[case], given) for case in WORKS if case in given.cases}


def fit(work: Work, given: Namespace) -> Work:
    """In the network's context, and made shorter for a rehearsal."""
    work = replace(work, new=max(work.new // given.shorter, 1), prompt=work.prompt // given.shorter)
    return replace(work, prompt=min(work.prompt, SHAPES[given.shape]["context"] - work.new))


def shown(seat: Seat, best: Seat | None, given: Namespace, ceiling: limits.Limits) -> Iterator[Any]:
    """A row a case."""
    for case, work in chosen(given).items():
        row = {"case": case, "threads": seat.threads, "engine": seat.name}
        if case in seat.why or case not in seat.taken:
            yield row | {"note": seat.why.get(case, "it was not measured")}
            continue
        turns = seat.taken[case]
        walls = [turn.wall for turn in turns]
        after = work.new - (case == WITHOUT_FIRST)
        tokens = work.streams * (work.prompt if work.new == 1 else after)
        yield row | {
            "tok/s": tokens / statistics.median(walls),
            "spread": spread(walls),
            "of limit": statistics.median(
                _lowest(case, work, seat, given, replace(ceiling, read=turn.read)) / turn.wall
                for turn in turns
            ),
            "cpu s": statistics.median(turn.cpu for turn in turns),
            **_against(seat, best, case),
            "peak MB": seat.peak >> 20,
        }


def _lowest(case: str, work: Work, seat: Seat, given: Namespace, ceiling: limits.Limits) -> float:
    how = seat.engine, seat.form, SHAPES[given.shape], ceiling
    found = least(work, *how)
    if case == WITHOUT_FIRST:
        found -= least(replace(work, new=1), *how)
    return found


def _against(seat: Seat, best: Seat | None, case: str) -> dict[str, float]:
    """Round by round, since what disturbs one round disturbs both."""
    if best is None or seat is best or case not in best.taken:
        return {}
    pairs = zip(seat.taken[case], best.taken[case])
    ratios = [theirs.wall / ours.wall for theirs, ours in pairs]
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
        for threads in given.threads:
            torch.set_num_threads(threads)
            ceiling = limits.measure(3)
            with limits.Memory(threads) as memory:
                for precision in given.precisions:
                    rivals = list(seats(given, precision, threads, work))
                    if not rivals:
                        continue
                    stay = fits(given, rivals)
                    contest(rivals, chosen(given), given.rounds, stay, given.patience, memory)
                    ours = next((seat for seat in rivals if seat.engine == "kvist"), None)
                    for seat in rivals:
                        found = shown(seat, ours, given, ceiling)
                        rows += [{"precision": precision, **row} for row in found]
            ceilings[threads] = memory.seen(ceiling)
    finish(given, rows, ceilings)


def finish(given: Namespace, rows: list[harness.Row], ceilings: dict[int, limits.Limits]) -> None:
    if not rows:
        sys.exit(f"no engine could take part: {given.missing}")
    fullest = max(rows, key=len)  # those that failed have fewer
    columns = dict.fromkeys([*fullest, *(name for row in rows for name in row)])
    rows = sorted(rows, key=lambda row: (row["threads"], row["precision"], _place(row["case"])))
    rows = [{name: row.get(name) for name in columns} for row in rows]
    draw(given.plot, given.shape, rows)
    for name, why in given.missing.items():
        print(f"{name}: {why}")
    harness.finish(
        "compare", rows, given, shape=given.shape, stored=SHAPES[given.shape]["stored"],
        precisions=given.precisions, rounds=given.rounds, missing=given.missing,
        versions=versions(),
        limits={threads: asdict(ceiling) for threads, ceiling in ceilings.items()},
        disturbed=max((row.get("spread") or 0 for row in rows), default=0) > 0.15,
    )  # fmt: skip


def versions() -> dict[str, str | None]:
    packages = {entry.package for entry in PEERS.values()}
    here = {
        one.name.replace("_", "-"): one.version
        for one in metadata.distributions()
        if one.name.replace("_", "-") in packages
    }
    return {package: here.get(package) for package in sorted(packages)}


def _place(case: str) -> int:
    return list(WORKS).index(case)


def options() -> Namespace:
    parser = harness.parser(__doc__)
    add = parser.add_argument
    parser.set_defaults(threads=[len(os.sched_getaffinity(0))])
    next(a for a in parser._actions if a.dest == "threads").nargs = "+"
    add("--shape", choices=SHAPES, default="llama-0.5b")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["int8", "float32"])
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
