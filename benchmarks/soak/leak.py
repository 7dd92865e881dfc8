"""G10: what a request leaves behind, in bytes and in open files."""

import argparse
import asyncio
import random
import statistics

from tqdm import tqdm

from benchmarks.served import served
from benchmarks.soak.ask import Row, ask, row
from benchmarks.soak.health import health

AT_ONCE, LEAVE = 50, 0.3  # requests under way; the share that nobody waits for


async def leaks(asked: argparse.Namespace) -> Row:
    """G10: bytes that a request leaves behind, when a third of them are left by their client."""
    async with served(asked) as one, health(one) as seen:
        rng, points, files = random.Random(1), [], one.files()
        answered = failed = 0
        for done in tqdm(range(0, asked.requests, AT_ONCE), unit=f"×{AT_ONCE}", disable=None):
            leave = [rng.uniform(0, 0.05) if rng.random() < LEAVE else None for _ in range(AT_ONCE)]
            asked_now = [ask(one.port, leave=seconds, max_tokens=4) for seconds in leave]
            said = await asyncio.gather(*asked_now)
            answered += sum(answer.done for answer in said)
            failed += sum(not answer.done and answer.error != "TimeoutError" for answer in said)
            points.append([done + AT_ONCE, *one.memory()])
        front, engine = slopes(points)
        await asyncio.sleep(1)
        opened, live = one.files() - files, await one.metric('pages{state="live"')
        found = {"requests": asked.requests, "answered": answered, "failed": failed}
        found |= {"front_bytes": round(front), "engine_bytes": round(engine)}
        found |= {"files_more": opened, "pages_live": round(live)}
    good = front + engine < 1000 and abs(opened) <= 5 and not live and not failed
    return row("G10", "leaks", good, found, seen)


def slopes(points: list[list[int]]) -> list[float]:
    """Bytes a request, of each process; the first half warms up."""
    requests, *sizes = zip(*points[len(points) // 2 :], strict=True)
    return [statistics.linear_regression(requests, one).slope for one in sizes]
