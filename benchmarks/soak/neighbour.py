"""How long clients wait for eight tokens, again and again, while others do what they do; from a
process of its own, so that what they wait for is the server and not the load's own Python."""

import asyncio
import json
import math
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from threading import Event, Thread

from benchmarks.served import HEAD, Served

TOKENS = 8
VISITORS = 4  # at once
PAUSE = 0.02  # seconds between two visits
ANSWER = 1 << 20  # bytes, more than it has: who waits for all of it is woken once, at its end


def ask(port: int) -> None:
    body = {"prompt": "Once upon a time", "stream": True, "temperature": 0, "max_tokens": TOKENS}
    raw = json.dumps(body).encode()
    head = f"{HEAD}content-length: {len(raw)}\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, ANSWER)
        one.sendall(head.encode() + raw)
        while one.recv(1 << 16):
            pass


def visit(port: int, ended: Event, until: float) -> None:
    """Ask over and over, and print how long each answer took."""
    while not ended.wait(PAUSE) and (began := time.monotonic()) < until:
        with suppress(OSError):
            ask(port)
            sys.stdout.write(f"{time.monotonic() - began}\n")


def main(port: int, seconds: float) -> None:
    """So long, or until told to end; who asked before that is waited for, since long waits count
    too."""
    ended, until = Event(), time.monotonic() + seconds
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    visitors = [Thread(target=visit, args=(port, ended, until)) for _ in range(VISITORS)]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join()


async def visits(one: Served, seconds: float) -> list[float]:
    """Their waits, of so many seconds."""
    visitor = await _visitor(one, seconds)
    return await _waits(visitor)


@asynccontextmanager
async def neighbour(one: Served) -> AsyncIterator[list[float]]:
    """The same as long as something else goes on; a list that is filled at the end."""
    visitor = await _visitor(one, math.inf)
    seen: list[float] = []
    try:
        yield seen
    finally:
        visitor.terminate()
        seen += await _waits(visitor)


async def _visitor(one: Served, seconds: float) -> Process:
    command = [sys.executable, "-m", "benchmarks.soak.neighbour", str(one.port), str(seconds)]
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)


async def _waits(visitor: Process) -> list[float]:
    told, _ = await visitor.communicate()
    return [float(wait) for wait in told.split()]


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
