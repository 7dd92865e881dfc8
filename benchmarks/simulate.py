"""A million requests through the simulation of tests/server/simulation: nothing may be violated.

    python -m benchmarks.simulate [--requests 1000000] [--from 10000] [--workers 2]

Each seed is a script of 200 operations with its own pages, budgets, faults and cancellations. Ends
in one JSON line; a violation prints the smallest script that still fails, and the exit status is 1.
"""

import argparse
import json
import logging
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice

from tests.server.simulation.executor import Violation
from tests.server.simulation.script import knobs, script
from tests.server.simulation.shrink import report
from tests.server.simulation.world import World

OPERATIONS, BATCH = 200, 50  # of a seed; seeds that a worker runs in one go


def run(first: int) -> tuple[int, int, int, list[str]]:
    """Requests accepted, cancelled, preempted, and reports of what went wrong."""
    logging.disable(logging.CRITICAL)  # the failures are meant
    accepted = cancelled = preempted = 0
    wrong = []
    for seed in range(first, first + BATCH):
        world = World(knobs(seed))
        ops = script(world.knobs, OPERATIONS)
        try:
            world.run(ops)
        except (Exception, Violation):
            wrong.append(report(world.knobs, ops))
        accepted += world.accepted
        cancelled += world.cancels
        preempted += world.preempted
    return accepted, cancelled, preempted, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--from", type=int, default=10_000, dest="first", help="the first seed")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    seeds, began = count(asked.first, BATCH), time.monotonic()
    done = accepted = cancelled = preempted = violations = 0
    with ProcessPoolExecutor(asked.workers) as pool:
        while accepted < asked.requests:
            for some in pool.map(run, islice(seeds, 4 * asked.workers)):
                done += BATCH
                accepted, cancelled = accepted + some[0], cancelled + some[1]
                preempted, violations = preempted + some[2], violations + len(some[3])
                for wrong in some[3]:
                    print(wrong, flush=True)
            print(f"\r{accepted:,} requests, {violations} violations", end="", file=sys.stderr)
    said = {"benchmark": "simulate", "seeds": done, "requests": accepted, "violations": violations}
    shares = {"cancelled": cancelled / accepted, "preempted": preempted / accepted}
    seconds = time.monotonic() - began
    print()
    print(json.dumps({**said, **{k: round(v, 3) for k, v in shares.items()}, "s": round(seconds)}))
    return violations > 0


if __name__ == "__main__":
    sys.exit(main())
