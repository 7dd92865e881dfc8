"""Random scripts over the production engine, its invariants after every step, and planted errors.

A failure prints the smallest script that still fails. `make test-slow` runs 2,000 seeds of 200
operations; `python -m benchmarks.simulate` runs a million requests.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

from tests.server.simulation.executor import Violation
from tests.server.simulation.mutants import MUTANTS, Mutant
from tests.server.simulation.script import knobs, script
from tests.server.simulation.shrink import failure, report, shrink
from tests.server.simulation.world import World

OPERATIONS = 200
FAST, ALL, KILL = 250, 2000, 200  # seeds


@pytest.fixture(autouse=True)
def no_clock() -> Iterator[None]:
    """Whoever asks a real clock is caught: all time is the simulation's."""

    def caught(*_: Any) -> NoReturn:
        raise Violation("I16: a real clock is read")

    logging.disable(logging.CRITICAL)  # the failures are meant; and log records have a time
    with ExitStack() as stack:
        for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter"):
            stack.enter_context(patch.object(time, name, caught))
        yield
    logging.disable(logging.NOTSET)


def run(seeds: range) -> None:
    """And see to it that the scripts are as hard as they are meant to be."""
    accepted = cancelled = preempted = 0
    for seed in seeds:
        world = World(knobs(seed))
        ops = script(world.knobs, OPERATIONS)
        try:
            world.run(ops)
        except (Exception, Violation):
            pytest.fail(report(world.knobs, ops), pytrace=False)
        accepted += world.accepted
        cancelled += world.cancels
        preempted += world.preempted
    assert cancelled > 0.3 * accepted
    assert preempted > 0.1 * accepted


def test_nothing_is_violated() -> None:
    run(range(FAST))


@pytest.mark.parametrize("seed", [37416, 42142])
def test_what_was_wrong_once_is_right(seed: int) -> None:
    """Found among a million requests: one that ends between its beginning and its first step."""
    world = World(knobs(seed))
    world.run(script(world.knobs, OPERATIONS))


@pytest.mark.slow
def test_nothing_is_violated_for_long() -> None:
    run(range(FAST, ALL))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_kills(mutant: Mutant) -> None:
    with mutant():
        for seed in range(KILL):
            some = knobs(seed)
            if failure(some, script(some, OPERATIONS)) is not None:
                return
    pytest.fail(f"{mutant.__name__} survived {KILL} seeds", pytrace=False)


def test_a_failing_script_shrinks_to_what_matters() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.__name__ == "lose_cancel_in_waiting")
    some = knobs(0)
    with mutant():
        small = shrink(some, script(some, OPERATIONS))
        assert failure(some, small) is not None
        assert all(failure(some, small[:i] + small[i + 1 :]) is None for i in range(len(small)))
    assert {op.name for op in small} == {"cancel", "submit"}
    assert failure(some, small) is None


def test_the_same_seed_is_the_same_run() -> None:
    def trace() -> list[Any]:
        world = World(knobs(7))
        world.run(script(knobs(7), OPERATIONS))
        return [(number, reader.told, reader.last) for number, reader in world.readers.items()]

    assert trace() == trace()
