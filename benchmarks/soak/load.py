"""G2, G7, G8: many streams, clients that are slow, and too many."""

import argparse
import asyncio
import json
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.served import HEAD, Served, served
from benchmarks.soak.ask import Row, Said, ask, row, spread, until, waits
from benchmarks.soak.health import health
from benchmarks.soak.neighbour import visits

DEAF: dict[str, Any] = {
    "prompt": "x",
    "stream": True,
    "max_tokens": 900,
    "ignore_eos": True,
    "logprobs": 20,
}

UNREAD = 20  # clients who read nothing
WINDOW = 2.0  # seconds for which others are asked beside them, before they are cut off
TURNS = 5  # since a shared machine is not as fast all the time


async def streams(asked: argparse.Namespace) -> Row:
    """G2: 1,000 at once; none fails, equal prompts give equal text."""
    count = asked.streams
    async with served(asked) as one, health(one) as seen:
        said = await asyncio.gather(*[ask(one.port, max_tokens=16) for _ in range(count)])
        texts = {one.text for one in said}
        good = all(one.done for one in said) and len(texts) == 1
        failed = sum(not one.done for one in said)
        found = {"streams": count, "failed": failed, "texts": len(texts)}
    return row("G2", "streams at once", good, found, seen)


async def slow(asked: argparse.Namespace) -> Row:
    """G7: 250 that send nothing more and 20 that read nothing; the others are served.

    Until the buffers between are full, nobody can tell who does not read, and its tokens are
    computed like anyone's: the others' time beside 20 who do read is told, too.
    """
    flags = ("--limit-receive-timeout", "5", "--limit-idle-timeout", "5")
    async with served(asked, *flags) as one, health(one) as seen:
        turns = [await _slowly(one) for _ in range(TURNS)]
    ratios = [statistics.median(turn.others) / statistics.median(turn.alone) for turn in turns]
    closed, ended = max(turn.closed for turn in turns), max(turn.ended for turn in turns)
    cut = min(turn.cut for turn in turns)
    found: dict[str, Any] = {"others_x": spread(ratios), "closed_s": round(closed, 1)}
    found |= {"unread_ended_s": round(ended, 1), "unread_cut": cut}
    found |= waits(
        alone=[wait for turn in turns for wait in turn.alone],
        others=[wait for turn in turns for wait in turn.others],
        beside_readers=[wait for turn in turns for wait in turn.readers],
    )
    good = closed < 31 and ended < 31 and cut >= UNREAD and statistics.median(ratios) < 3
    return row("G7", "slow clients", good, found, seen)


@dataclass
class Slow:
    """How long others waited alone, beside clients who read, and beside those who do not; after
    how many seconds these were gone, and how many of the latter were cut off."""

    alone: list[float]
    readers: list[float]
    others: list[float]
    closed: float
    ended: float
    cut: float


async def _slowly(one: Served) -> Slow:
    alone = await visits(one, WINDOW)
    reading = [asyncio.create_task(ask(one.port, **DEAF)) for _ in range(UNREAD)]
    readers = await visits(one, WINDOW)
    for task in reading:
        task.cancel()
    await until(lambda: one.metric("vllm:num_requests_running"), 0)
    gone = await one.metric("requests_aborted_total")
    held = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(250)]
    for _, writer in held:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    unread = [_deaf(one.port) for _ in range(UNREAD)]
    began = time.monotonic()
    others = await visits(one, WINDOW)
    for reader, writer in held:
        await asyncio.wait_for(reader.read(), 35)
        writer.close()
    closed = time.monotonic() - began
    ended = await until(lambda: one.metric("vllm:num_requests_running"), 0) - began
    for sock in unread:
        sock.close()
    cut = await one.metric("requests_aborted_total") - gone
    return Slow(alone, readers, others, closed, ended, cut)


def _deaf(port: int) -> socket.socket:
    """A client that asks for more than the buffers between hold, and reads none of it."""
    raw = json.dumps(DEAF).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(f"{HEAD}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return sock


async def overload(asked: argparse.Namespace) -> Row:
    """G8: ten times what fits; the rest is refused at once, and what is served is no less."""
    flags = ("--limit-queue-requests", "16", "--rows", "8")
    async with served(asked, *flags) as one, health(one) as seen:
        await _insisting(one.port, 16, 1)
        before = sum(one.memory())
        peaks, rates, said = list[float](), list[float](), list[Said]()
        for _ in range(TURNS):
            peak, fair = await _insisting(one.port, 16, asked.seconds / TURNS)
            assert all(said.done for said in peak), "nobody is refused at the peak"
            many, rate = await _insisting(one.port, 80, asked.seconds / TURNS)
            peaks, rates, said = [*peaks, fair], [*rates, rate], said + many
        ratio = statistics.median(rate / fair for rate, fair in zip(rates, peaks, strict=True))
        refused = [one for one in said if one.status == 429]
        slowest = max((said.seconds for said in refused), default=0)
        growth = (sum(one.memory()) - before) / 2**20
        found = {
            "peak_per_s": round(statistics.median(peaks), 1),
            "served_per_s": round(statistics.median(rates), 1),
            "served_of_peak": round(ratio, 2),
            "refused": len(refused),
            "slowest_refusal_s": round(slowest, 2),
            "mib_more": round(growth),
        }
        good = ratio >= 0.95 and bool(refused) and slowest <= 1 and growth < 64
    return row("G8", "overload", good, found, seen)


async def _insisting(port: int, clients: int, seconds: float) -> tuple[list[Said], float]:
    """What they were told, and how many of them were served a second."""
    began = time.monotonic()
    each = [_insist(port, began + seconds) for _ in range(clients)]
    said = [one for many in await asyncio.gather(*each) for one in many]
    return said, sum(one.done for one in said) / (time.monotonic() - began)


async def _insist(port: int, end: float) -> list[Said]:
    """One client, again and again; when refused it waits as it was told to."""
    said = []
    while time.monotonic() < end:
        said.append(await ask(port, max_tokens=32))
        if said[-1].status == 429:
            await asyncio.sleep(max(0.0, min(1.0, end - time.monotonic())))
    return said
