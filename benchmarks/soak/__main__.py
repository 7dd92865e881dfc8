"""`python -m benchmarks.soak`: the goals, one after the other."""

import argparse
import asyncio
import resource
import sys
from collections.abc import Awaitable, Callable

import benchmarks.soak
from benchmarks.harness import finish
from benchmarks.soak.ask import Row
from benchmarks.soak.faults import deaths, drains
from benchmarks.soak.fuzz import fuzz
from benchmarks.soak.health import healthy
from benchmarks.soak.keys import auth
from benchmarks.soak.leak import leaks
from benchmarks.soak.leaving import cancels
from benchmarks.soak.load import overload, slow, streams
from benchmarks.soak.starts import starts

GOALS: dict[str, Callable[[argparse.Namespace], Awaitable[Row]]] = {
    "G2": streams,
    "G3": cancels,
    "G4": deaths,
    "G5": drains,
    "G6": fuzz,
    "G7": slow,
    "G8": overload,
    "G10": leaks,
    "G12": starts,
    "G13": auth,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=benchmarks.soak.__doc__)
    parser.add_argument("model", nargs="?", help="a small model; nothing: the embedded one")
    parser.add_argument("--only", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument(
        "--times", type=int, default=3, help="repetitions of deaths, drains and starts"
    )
    parser.add_argument("--rate", type=int, default=500, help="clients that leave, a second")
    parser.add_argument("--mutations", type=int, default=10_000, help="of valid requests")
    parser.add_argument("--requests", type=int, default=3000, help="of the leak test")
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    rows: list[Row] = []
    for goal in asked.only:
        print((GOALS[goal].__doc__ or "").splitlines()[0], flush=True)
        rows.append(asyncio.run(GOALS[goal](asked)))  # type: ignore[arg-type]
    rows += healthy(rows)
    finish("soak", rows, asked)
    return int(any(row["met"] != "True" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
