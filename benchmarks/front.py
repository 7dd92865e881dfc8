"""What the HTTP layer costs, with a model that costs nothing: tokens/s a core, and its latency.

    python -m benchmarks.front [--streams 1 64 256 1000] [--seconds 5]

The server is the real one: listener, routes, the engine in its process, its scheduler. Only the
network is replaced: it says anything, a step every few milliseconds. The text of each token is
the time at which the engine handed it over, as it would to a caller in its own process, and then
the time at which the front had it in its hands: so the client sees how long it was on its way
(`late`), and how much of that was HTTP's (`http`). CPU time is of the server's front process alone.
The reader has a core of its own, and the server the others: woken on the front's core, it stood in
line behind it for half a millisecond a token, told as the server's. Ends in one JSON line.
"""

import argparse
import asyncio
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks import processes
from benchmarks.harness import finish
from model.batch import Batch, Output
from server.api.app import build as build_app
from server.api.front import Front
from server.api.keys import Keys
from server.api.served import Served
from server.config import Settings
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.process import Blueprint, Client
from server.engine.registry import Registry
from server.engine.request import Event
from server.listen import bind, configure
from server.metrics import Metrics
from server.settle import settle

CONTEXT, VOCABULARY = 1 << 20, 256
HEARD = "h"  # before a time
UNREAD = 256  # events, as in the server
CORES = sorted(os.sched_getaffinity(0))


class Nothing:
    """A network that takes `pause` seconds a step and always says the same."""

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._next = 0.0

    def launch(self, batch: Batch) -> Callable[[], Output]:
        samples, rows = len(batch.sample_at), len(batch.lengths)
        ints, floats = np.zeros((samples, 0), np.int32), np.zeros((samples, 0), np.float32)
        output = Output(
            tokens=np.full(samples, 97, np.int32),
            logprobs=np.zeros(samples, np.float32),
            ranks=np.ones(samples, np.int32),
            top_tokens=ints,
            top_logprobs=floats,
            score_logprobs=floats[:0, 0:],
            score_ranks=ints[:0, 0:],
            score_top_tokens=ints[:0],
            score_top_logprobs=floats[:0],
            beam_tokens=ints[:0],
            beam_logprobs=floats[:0],
            bad=np.zeros(rows, np.int32),
        )
        return lambda: self._wait(output)

    def _wait(self, output: Output) -> Output:
        now = time.monotonic()
        self._next = max(self._next + self._pause, now)
        time.sleep(self._next - now)
        return output


class Stamping(Engine):
    """Says of each token when it was handed over."""

    def step(self) -> list[Event]:
        events = super().step()
        stamp = f"{time.monotonic():.6f} "
        for event in events:
            for choice in event.choices:
                choice.text = stamp * len(choice.tokens)
        return events


class Hearing(Registry):
    """Says when it got what was heard; what follows is the HTTP layer."""

    def deliver(self, events: Iterable[Event]) -> list[str]:
        return super().deliver(map(partial(_heard, f"{HEARD}{time.monotonic():.6f} "), events))


def _heard(stamp: str, event: Event) -> Event:
    for choice in event.choices:
        choice.text += stamp
    return event


def build(pause: float, rows: int) -> Engine:
    """The engine process's part."""
    pages = Pages(CONTEXT // 16, 16)
    options = Options(seats=rows, budget=1 << 16, queue=8192, queue_tokens=1 << 40)
    return Stamping(Nothing(pause), pages, options)


class Words:
    """Letters are tokens."""

    eos = bos = None
    special: dict[str, int] = {}  # noqa: RUF012, a protocol's attribute

    def encode(self, text: str, **_: bool) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:  # noqa: ARG002
        return bytes(ids).decode()

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])


async def serve(pause: float, rows: int) -> None:
    """The front process: print the port, and serve until it is ended."""
    settings = Settings(log_level="error", shutdown_timeout=1)
    options = {"pause": pause, "rows": rows}
    client = Client(Blueprint(build="benchmarks.front:build", options=options))
    client._registry = Hearing(UNREAD)
    front = Front(settings, client, Metrics("any", "bench"), Keys(None))
    front.served = Served(
        names=("any",),
        words=Words(),
        template=None,
        context=CONTEXT,
        vocabulary=VOCABULARY,
        capacity=CONTEXT,
        eos=(),
        created=0,
        fingerprint="bench",
        limits=settings.limits,
    )
    await client.start()
    settle()
    listener = bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    await configure(build_app(front), front).serve([listener])
    await client.stop()


@dataclass
class Told:
    tokens: int = 0
    events: int = 0
    late: list[float] = field(default_factory=list)  # seconds on the way, of each event
    http: list[float] = field(default_factory=list)  # and of these, those after the front had it

    def read(self, parts: list[tuple[float, bytes]]) -> None:
        """What one stream brought, and when."""
        rest = b""
        for now, data in parts:
            *blocks, rest = (rest + data).split(b"\n\n")
            for block in blocks:
                start = block.find(b'"text":"') + 8
                stamps = block[start : block.find(b'"', start)].split() if start > 7 else []
                made = [stamp for stamp in stamps if not stamp.startswith(HEARD.encode())]
                self.tokens += len(made)
                self.events += len(made) > 0
                if made:
                    self.late.append(now - float(made[-1]))
                    self.http.append(now - float(stamps[-1].removeprefix(HEARD.encode())))


def listen(port: int, streams: int, tokens: int) -> Told:
    """All streams, read as plainly as can be, and understood afterwards: with a reader that takes
    longer a token than the server (asyncio's, 30 us), it would be the reader that is measured. It
    never sleeps, as over a network no client is woken by the server's core."""
    body = json.dumps({"prompt": "x", "max_tokens": tokens, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    asked = f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
    ears, open_ones = select.epoll(), {}
    parts: dict[int, list[tuple[float, bytes]]] = {}
    for _ in range(streams):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(asked)
        ears.register(one.fileno(), select.EPOLLIN)
        open_ones[one.fileno()], parts[one.fileno()] = one, []
    while open_ones:
        for fd, _ in ears.poll(0):
            data = os.read(fd, 1 << 16)
            parts[fd].append((time.monotonic(), data))
            if not data:
                ears.unregister(fd)
                open_ones.pop(fd).close()
    told = Told()
    for some in parts.values():
        told.read(some)
    return told


def measure(streams: int, pause: float, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.front", "--serve", str(pause), str(streams)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(child.pid, CORES[:-1] or CORES)
    os.sched_setaffinity(0, CORES[-1:])
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        listen(port, min(streams, 8), 4)  # warm
        tokens = max(4, int(seconds / max(pause, streams / 20_000)))
        before, began = processes.seconds(child.pid), time.monotonic()
        told = listen(port, streams, tokens)
        wall, spent = time.monotonic() - began, processes.seconds(child.pid) - before
    finally:
        child.terminate()
        child.wait(10)
        os.sched_setaffinity(0, CORES)
    late = sorted(told.late)
    return {
        "streams": streams,
        "step_ms": pause * 1000,
        "tokens": told.tokens,
        "whole": told.tokens == streams * tokens,
        "tokens_per_s": told.tokens / wall,
        "tokens_per_cpu_s": told.tokens / spent,
        "events_per_cpu_s": told.events / spent,
        "http_ms": statistics.mean(told.http) * 1000,
        "late_ms": statistics.mean(late) * 1000,
        "late_median_ms": statistics.median(late) * 1000,
        "late_p99_ms": late[int(len(late) * 0.99)] * 1000,
        "cpu_ms_per_event": spent / told.events * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1000])
    parser.add_argument("--step-ms", type=float, default=25.0, help="the network's time a step")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        pause, rows = asked.serve
        import uvloop

        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(serve(float(pause), int(rows)))
        return
    pauses = dict.fromkeys(asked.streams, asked.step_ms / 1000)
    rows = [measure(streams, pause, asked.seconds) for streams, pause in pauses.items()]
    rows.append(measure(asked.streams[-1], 0.0, asked.seconds))  # as fast as it goes
    finish("front", rows, asked, goal={"tokens_per_cpu_s": 3000, "http_ms": 1.0})


if __name__ == "__main__":
    main()
