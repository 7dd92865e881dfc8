"""G3: 500 clients a second who leave, and what the others notice of it."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.served import Served, served
from benchmarks.soak.ask import Row, percentile, row, spread, until, waits
from benchmarks.soak.crowd import MOST, Crowd, crowd, hasty, leavers, stayers
from benchmarks.soak.health import health
from benchmarks.soak.neighbour import TOKENS, neighbour, visits

MADE = "vllm:generation_tokens_total"
TURNS = 3  # at least, and one …
TURN = 5.0  # … each so many seconds: what a shared machine gives changes within half a minute
LONGEST = 0.2  # seconds that a leaver stays at most


@dataclass
class Gone:
    """A crowd that left, and what the others waited for beside it."""

    others: list[float]
    crowd: Crowd
    front: float  # seconds of CPU, the others' share included
    engine: float
    unread: float  # tokens made that nobody got
    back: float  # seconds from the last one's end to that of the last page in use


@dataclass
class Turn:
    """How long the others waited with nobody else here, beside clients who hang up when their
    answer begins, beside those who do it at any moment, and beside as many who stay: they ask for
    what those get, and wait until they have it."""

    alone: list[float]
    hasty: Gone
    leaving: Gone
    staying: list[float]


async def cancels(asked: argparse.Namespace) -> Row:
    """G3: clients that leave; nothing stays behind, and the others hardly notice.

    Who hangs up at once is a cancel and little more: others may take twice as long as alone.
    Who takes up to 0.2 s to leave is one of fifty streams by then, a load whoever leaves: what its
    leaving costs is told beside as many who get as many tokens, and stay to the end of them.
    """
    async with served(asked) as one, health(one) as seen:
        await _turn(one, asked.rate, 1)
        count = max(TURNS, round(asked.seconds / TURN))
        turns = [await _turn(one, asked.rate, asked.seconds / count) for _ in range(count)]
        running = await one.metric("vllm:num_requests_running")
    gone = [crowd for turn in turns for crowd in (turn.hasty, turn.leaving)]
    clients, failed = (sum(getattr(a.crowd, name) for a in gone) for name in ("clients", "failed"))
    wasted = sum(max(0, one.unread) for one in gone) / (MOST * clients)
    back = max(one.back for one in gone)
    hastes, of_alone = _ratios(turns, lambda turn: (turn.hasty.others, turn.alone))
    leaves, of_beside = _ratios(turns, lambda turn: (turn.leaving.others, turn.staying))
    found = {
        "cancels": clients,
        "front_cpu_ms": round(sum(one.front for one in gone) / clients * 1000, 2),
        "engine_cpu_ms": round(sum(one.engine for one in gone) / clients * 1000, 2),
        "wasted": round(wasted, 3),
        "failed": failed,
        "left": running,
        "back_s": round(back, 2),
        "hasty_of_alone": of_alone,
        "leavers_of_beside_stayers": of_beside,
        "leavers_of_alone": _ratios(turns, lambda turn: (turn.leaving.others, turn.alone))[1],
    }
    found |= waits(
        alone=[wait for turn in turns for wait in turn.alone],
        beside_hasty=[wait for turn in turns for wait in turn.hasty.others],
        beside_leavers=[wait for turn in turns for wait in turn.leaving.others],
        beside_stayers=[wait for turn in turns for wait in turn.staying],
    )
    whole = running == 0 and failed == 0 and back < 1 and wasted < 0.1
    return row("G3", "clients that leave", whole and hastes < 2 and leaves < 2, found, seen)


async def _turn(one: Served, rate: int, seconds: float) -> Turn:
    alone = await visits(one, seconds)
    at_once = await _gone(one, hasty, seconds, rate)
    later = await _gone(one, leavers, seconds, rate, LONGEST)
    async with neighbour(one) as staying:
        await crowd(stayers, one.port, seconds, rate, later.crowd.tokens / later.crowd.clients)
    return Turn(alone, at_once, later, staying)


async def _gone(one: Served, who: Callable[..., Crowd], *numbers: float) -> Gone:
    made, before = await one.metric(MADE), one.computed()
    async with neighbour(one) as others:
        left = await crowd(who, one.port, *numbers)
        gone = time.monotonic()
    back = await until(lambda: one.metric('pages{state="live"'), 0) - gone
    front, engine = (now - then for now, then in zip(one.computed(), before, strict=True))
    unread = await one.metric(MADE) - made - left.tokens - TOKENS * len(others)
    return Gone(others, left, front, engine, unread, back)


def _ratios(
    turns: list[Turn], two: Callable[[Turn], tuple[list[float], list[float]]]
) -> tuple[float, str]:
    """The first's 99th percentile over the second's, a turn: median and spread."""
    pairs = [[percentile(waits, 0.99) for waits in two(turn)] for turn in turns]
    found = [one / other for one, other in pairs]
    return statistics.median(found), spread(found)
