"""How long clients wait for eight tokens, again and again, while others do what they do; from a
process of its own, so that what they wait for is the server and not the load's own Python."""

import asyncio
import json
import signal
import socket
import sys
import time
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


def visit(port: int, ended: Event) -> None:
    """Ask over and over, and print how long each answer took."""
    while not ended.wait(PAUSE):
        began = time.monotonic()
        with suppress(OSError):
            ask(port)
            sys.stdout.write(f"{time.monotonic() - began}\n")


def main(port: int) -> None:
    """Until told to end; who asked before that is waited for, since long waits count too."""
    ended = Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    visitors = [Thread(target=visit, args=(port, ended)) for _ in range(VISITORS)]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join()


@asynccontextmanager
async def neighbour(one: Served) -> AsyncIterator[list[float]]:
    """A list that is filled at the end."""
    command = [sys.executable, "-m", "benchmarks.soak.neighbour", str(one.port)]
    visitor = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    seen: list[float] = []
    try:
        yield seen
    finally:
        visitor.terminate()
        told, _ = await visitor.communicate()
        seen += map(float, told.split())


if __name__ == "__main__":
    main(int(sys.argv[1]))
