"""The smallest part of a failing script that still fails in the same way."""

from tests.server.simulation.executor import Violation
from tests.server.simulation.script import Knobs, Op
from tests.server.simulation.world import World


def failure(knobs: Knobs, ops: list[Op]) -> str | None:
    """What is violated, or None."""
    try:
        World(knobs).run(ops)
    except (Exception, Violation) as error:
        return f"{type(error).__name__} {error}"
    return None


def shrink(knobs: Knobs, ops: list[Op]) -> list[Op]:
    """Leave out halves, quarters, … and at last single operations, while it goes on failing."""
    size = len(ops) // 2
    while size:
        at = 0
        while at < len(ops):
            fewer = ops[:at] + ops[at + size :]
            if failure(knobs, fewer) is not None:
                ops = fewer
            else:
                at += size
        size //= 2
    return ops


def report(knobs: Knobs, ops: list[Op]) -> str:
    """What to paste into a test."""
    small = shrink(knobs, ops)
    lines = "\n".join(f"    {op!r}," for op in small)
    return f"{failure(knobs, small)}\nseed {knobs.seed}: {knobs}\n[\n{lines}\n]"
