"""G9: how long an answer about health takes, asked for all along, from a process of its own."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from http.client import HTTPConnection

from benchmarks.served import Served
from benchmarks.soak.ask import Row, row

PATIENCE = 30.0  # seconds after which an answer is a hang


def watch(port: int) -> None:
    """Ask over and over, and print how long each answer took."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        began = time.monotonic()
        with suppress(OSError):
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            connection.close()
            print(time.monotonic() - began, flush=True)
        time.sleep(0.02)


@asynccontextmanager
async def health(one: Served) -> AsyncIterator[list[float]]:
    """A list that is filled at the end."""
    command = [sys.executable, "-m", "benchmarks.soak.health", str(one.port)]
    watcher = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    seen: list[float] = []
    try:
        yield seen
    finally:
        watcher.terminate()
        told, _ = await watcher.communicate()
        seen += map(float, told.split())


def healthy(rows: Sequence[Row]) -> list[Row]:
    """Under every goal that was measured: p99 below 50 ms, none above a second."""
    asked = [one for one in rows if one["health_max_ms"] is not None]
    if not asked:
        return []
    names = ("health_p99_ms", "health_max_ms")
    worst = {name: max(one[name] for one in asked) for name in names}
    late = [one["goal"] for one in asked if one["health_p99_ms"] >= 50]
    found = {"under": len(asked), "p99_above_50_ms": " ".join(late) or "none"}
    good = not late and worst["health_max_ms"] < 1000
    return [row("G9", "health under all of them", good, found, []) | worst]


if __name__ == "__main__":
    watch(int(sys.argv[1]))
