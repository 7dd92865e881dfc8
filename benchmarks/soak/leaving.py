"""G3: 500 clients a second who leave, and what the others notice of it."""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.served import Served, served
from benchmarks.soak.ask import Row, percentile, row, until, waits
from benchmarks.soak.crowd import Crowd, crowd, leavers, stayers
from benchmarks.soak.health import health
from benchmarks.soak.neighbour import TOKENS, neighbour

MADE = "vllm:generation_tokens_total"
TURNS = 3  # since a shared machine is not as fast all the time
LONGEST = 0.2  # seconds that a leaver stays at most


@dataclass
class Turn:
    """How long the others waited with nobody else here, beside leavers, and beside as many who
    ask for what leavers get, and stay until they have it."""

    alone: list[float]
    leaving: list[float]
    staying: list[float]
    crowd: Crowd
    front: float  # seconds of CPU beside the leavers, the others' share included
    engine: float
    unread: float  # tokens made that nobody got
    back: float  # seconds from the last leaver's end to that of the last page in use


async def cancels(asked: argparse.Namespace) -> Row:
    """G3: clients that leave; nothing stays behind, and the others hardly notice.

    500 requests a second are a load, whoever leaves: `of_alone` tells of both. What the leaving
    costs is told beside as many newcomers who get as many tokens, and stay to the end of them.
    """
    async with served(asked) as one, health(one) as seen:
        await _turn(one, asked.rate, 1)
        turns = [await _turn(one, asked.rate, asked.seconds / TURNS) for _ in range(TURNS)]
        running = await one.metric("vllm:num_requests_running")
    count, failed = (sum(getattr(t.crowd, name) for t in turns) for name in ("clients", "failed"))
    wasted = sum(max(0, turn.unread) for turn in turns) / (200 * count)
    back = max(turn.back for turn in turns)
    ratio, told = _ratios(turns, lambda turn: turn.staying)
    found = {
        "cancels": count,
        "front_cpu_ms": round(sum(turn.front for turn in turns) / count * 1000, 2),
        "engine_cpu_ms": round(sum(turn.engine for turn in turns) / count * 1000, 2),
        "wasted": round(wasted, 3),
        "failed": failed,
        "left": running,
        "back_s": round(back, 2),
        "of_beside_stayers": told,
        "of_alone": _ratios(turns, lambda turn: turn.alone)[1],
    }
    found |= waits(
        alone=[wait for turn in turns for wait in turn.alone],
        beside_leavers=[wait for turn in turns for wait in turn.leaving],
        beside_stayers=[wait for turn in turns for wait in turn.staying],
    )
    good = running == 0 and failed == 0 and back < 1 and wasted < 0.1 and ratio < 2
    return row("G3", "clients that leave, judged beside as many who stay", good, found, seen)


async def _turn(one: Served, rate: int, seconds: float) -> Turn:
    async with neighbour(one) as alone:
        await asyncio.sleep(seconds)
    made, before = await one.metric(MADE), one.computed()
    async with neighbour(one) as leaving:
        left = await crowd(leavers, one.port, seconds, rate, LONGEST)
        gone = time.monotonic()
    back = await until(lambda: one.metric('pages{state="live"'), 0) - gone
    front, engine = (now - then for now, then in zip(one.computed(), before, strict=True))
    unread = await one.metric(MADE) - made - left.tokens - TOKENS * len(leaving)
    async with neighbour(one) as staying:
        await crowd(stayers, one.port, seconds, rate, left.tokens / left.clients)
    return Turn(alone, leaving, staying, left, front, engine, unread, back)


def _ratios(turns: list[Turn], beside: Callable[[Turn], list[float]]) -> tuple[float, str]:
    """The others' 99th percentile beside leavers over this one, a turn: median and spread."""
    found = [percentile(turn.leaving, 0.99) / percentile(beside(turn), 0.99) for turn in turns]
    middle = statistics.median(found)
    return middle, f"{middle:.2f} ({min(found):.2f} to {max(found):.2f})"
