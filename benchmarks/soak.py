"""The whole server under load and faults, against the numbers that it promises.

    python -m benchmarks.soak [MODEL] [--only G2 G3 …] [--seconds 10]

Each goal starts its own server on loopback and ends it. Loads are bounded in number and time. The
exit status is 1 when a goal is missed. Ends in one JSON line.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.harness import finish

HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
Row = dict[str, Any]


class Served:
    """A server process of our own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def get(self, path: str) -> tuple[int, bytes]:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return 0, b""
        with suppress(OSError):
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            data = await reader.read()
            writer.close()
            return _status(data), data.partition(b"\r\n\r\n")[2]
        return 0, b""

    async def status(self, path: str) -> int:
        return (await self.get(path))[0]

    async def ready(self, seconds: float = 120) -> float:
        began = time.monotonic()
        while (await self.get("/health/ready"))[0] != 200:
            if time.monotonic() - began > seconds or self.process.returncode is not None:
                raise SystemExit("the server does not come up")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

    def engine(self) -> int:
        """The child that runs the model."""
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.children()}
        return next(pid for pid, line in lines.items() if b"engine" in line)

    async def metric(self, name: str) -> float:
        _, page = await self.get("/metrics")
        lines = [line for line in page.decode().splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@asynccontextmanager
async def served(asked: argparse.Namespace, *flags: str) -> AsyncIterator[Served]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *flags]
    command += ["--log-level", "error", "--model", asked.model] if asked.model else []
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    made = Served(process, port)
    try:
        await made.ready()
        yield made
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait_for(process.wait(), 60)


@dataclass
class Said:
    """What one request got."""

    status: int = 0
    text: str = ""
    done: bool = False  # [DONE] came, or the plain answer was whole
    error: str = ""
    seconds: float = 0.0
    first: float = 0.0


async def ask(port: int, leave: float | None = None, **body: Any) -> Said:
    """One streamed completion; `leave`: hang up after so many seconds."""
    said, began = Said(), time.monotonic()
    raw = json.dumps(
        {"prompt": "Once upon a time", "stream": True, "temperature": 0} | body
    ).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        said.error = type(error).__name__
        return said
    writer.write(f"{HEAD}content-length: {len(raw)}\r\nconnection: close\r\n\r\n".encode() + raw)
    try:
        async with asyncio.timeout(leave):
            data = b""
            while part := await reader.read(1 << 16):
                said.first = said.first or time.monotonic() - began
                data += part
    except (TimeoutError, OSError) as error:
        said.error = type(error).__name__
    finally:
        writer.transport.abort()
    said.seconds = time.monotonic() - began
    _read(said, data)
    return said


def _status(data: bytes) -> int:
    return int(data[9:12]) if data.startswith(b"HTTP/1.1 ") else 0


def _read(said: Said, data: bytes) -> None:
    said.status = _status(data)
    said.done = b"data: [DONE]" in data
    if said.status > 200:
        said.error = json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"]
    for line in data.decode("utf-8", "replace").splitlines():
        if line.startswith("data: {"):
            body = json.loads(line[6:])
            if "error" in body:
                said.error = body["error"]["code"]
            for choice in body.get("choices", ()):
                said.text += choice["text"]


def watch(port: int) -> None:
    """Ask for life over and over, in a process of its own, and print how long each answer took."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        began = time.monotonic()
        with suppress(OSError):
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            connection.close()
            print(time.monotonic() - began, flush=True)
        time.sleep(0.05)


@asynccontextmanager
async def health(one: Served) -> AsyncIterator[list[float]]:
    """G9 of every test: a list that is filled at the end."""
    command = [sys.executable, "-m", "benchmarks.soak", "--watch", str(one.port)]
    watcher = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    seen: list[float] = []
    try:
        yield seen
    finally:
        watcher.terminate()
        told, _ = await watcher.communicate()
        seen += map(float, told.split())


def row(goal: str, about: str, good: bool, found: dict[str, Any], seen: list[float]) -> Row:
    slowest = max(seen, default=0.0)
    p99 = sorted(seen)[int(len(seen) * 0.99)] if seen else 0.0
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    healthy = slowest < 1
    health = {"health_p99_ms": round(p99 * 1000, 1), "health_max_ms": round(slowest * 1000, 1)}
    return {"goal": goal, "about": about, "met": str(good and healthy), "found": told, **health}


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


async def cancels(asked: argparse.Namespace) -> Row:
    """G3: clients that leave; nothing stays behind, and the others hardly notice."""
    async with served(asked) as one, health(one) as seen:
        alone = [(await ask(one.port, max_tokens=8)).seconds for _ in range(20)]
        rng, tasks, others = random.Random(1), [], []
        loaded = _cpu(one.process.pid), _cpu(one.engine())
        end = time.monotonic() + asked.seconds
        while time.monotonic() < end:
            tasks += [
                asyncio.create_task(ask(one.port, leave=rng.uniform(0, 0.2), max_tokens=200))
                for _ in range(asked.rate // 20)
            ]
            if len(tasks) % (asked.rate // 2) == 0:
                others.append(asyncio.create_task(ask(one.port, max_tokens=8)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        neighbours = [one.seconds for one in await asyncio.gather(*others)]
        gone = time.monotonic()
        back = await until(lambda: one.metric('pages{state="live"'), 0) - gone
        left = await one.metric("vllm:num_requests_running")
        made = await one.metric("vllm:generation_tokens_total") - 8 * (len(alone) + len(others))
        front, engine = _cpu(one.process.pid) - loaded[0], _cpu(one.engine()) - loaded[1]
        found = {
            "cancels": len(tasks),
            "front_cpu_ms": round(front / len(tasks) * 1000, 2),
            "engine_cpu_ms": round(engine / len(tasks) * 1000, 2),
            "wasted": round(made / (200 * len(tasks)), 3),
            "left": left,
            "back_s": round(back, 2),
            "alone_ms": round(statistics.median(alone) * 1000),
            "others_ms": round(statistics.median(neighbours or [0]) * 1000),
        }
        good = left == 0 and back < 1 and made < 0.1 * 200 * len(tasks)
        good = good and statistics.median(neighbours) < 2 * statistics.median(alone)
    return row("G3", "clients that leave", good, found, seen)


async def deaths(asked: argparse.Namespace) -> Row:
    """G4: the engine is killed in mid-stream; each client hears of it, and all comes back."""
    seen: list[float] = []
    all_told: list[Died] = []
    while len(all_told) < asked.times:  # a fifth death in five minutes is the end, as it should
        async with served(asked) as one, health(one) as some:
            before = (await ask(one.port, max_tokens=24)).text
            left = range(min(4, asked.times - len(all_told)))
            all_told += [await _death(one, before) for _ in left]
        seen += some
    told, back = (max(getattr(one, name) for one in all_told) for name in ("told", "back"))
    found = {
        "times": asked.times,
        "clients_told": sum(one.cut for one in all_told),
        "told_s": round(told, 2),
        "down_s": round(max(one.down for one in all_told), 2),
        "back_s": round(back, 2),
        "same": sum(one.same for one in all_told),
    }
    down = max(one.down for one in all_told)
    good = told < 2 and down < 2 and back < 15 and found["same"] == asked.times
    return row("G4", "engine killed", good and all(one.cut for one in all_told), found, seen)


@dataclass
class Died:
    """What one death was to those who had something under way."""

    told: float  # seconds until the last of them had its error event
    down: float  # until the server said that it is not ready
    back: float  # until it was ready again
    cut: int  # clients whose stream was under way
    same: bool  # the same prompt gives the same text


async def _death(one: Served, before: str) -> Died:
    many = range(32)
    running = [asyncio.create_task(ask(one.port, max_tokens=900, ignore_eos=True)) for _ in many]
    await until(lambda: one.metric("vllm:num_requests_running"), 32)
    began = time.monotonic()
    os.kill(one.engine(), signal.SIGKILL)
    down = asyncio.create_task(until(lambda: one.status("/health/ready"), 503))
    said = await asyncio.gather(*running)
    told = time.monotonic() - began
    wrong = [one for one in said if one.done or one.status != 200 or one.error != "engine_down"]
    assert not wrong, wrong
    down_s = await down - began
    await one.ready()
    back = time.monotonic() - began
    again = await ask(one.port, max_tokens=24)
    return Died(told, down_s, back, len(said), again.text == before)


async def until(look: Callable[[], Awaitable[float]], value: float) -> float:
    """When it is so."""
    async with asyncio.timeout(60):
        while await look() != value:
            await asyncio.sleep(0.01)
    return time.monotonic()


async def drains(asked: argparse.Namespace) -> Row:
    """G5: SIGTERM with streams under way and waiting; none is cut, the status is 0, all is left."""
    cut, statuses, left, refused = 0, [], 0, []
    for _ in range(asked.times):
        async with served(asked, "--rows", "16") as one:
            running = [asyncio.create_task(ask(one.port, max_tokens=64)) for _ in range(32)]
            await until(lambda: one.metric("vllm:num_requests_waiting"), 16)
            children = one.children()
            began = time.monotonic()
            one.process.terminate()
            refused.append(await until(lambda: one.status("/v1/models"), 0) - began)
            cut += sum(not said.done for said in await asyncio.gather(*running))
            statuses.append(await one.process.wait())
            left += sum(Path(f"/proc/{pid}/stat").exists() for pid in children)
    found = {"times": asked.times, "cut": cut, "statuses": sorted(set(statuses)), "left": left}
    found["refused_s"] = round(max(refused), 2)
    good = not cut and set(statuses) == {0} and not left and max(refused) < 1
    return row("G5", "SIGTERM drains", good, found, [])


async def slow(asked: argparse.Namespace) -> Row:
    """G7: 250 that send nothing more and 20 that read nothing; the others are served."""
    flags = ("--limit-receive-timeout", "5", "--limit-idle-timeout", "5")
    async with served(asked, *flags) as one, health(one) as seen:
        alone = [(await ask(one.port, max_tokens=8)).seconds for _ in range(10)]
        held = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(250)]
        for _, writer in held:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        unread = [_deaf(one.port) for _ in range(20)]
        during = [(await ask(one.port, max_tokens=8)).seconds for _ in range(10)]
        began = time.monotonic()
        for reader, writer in held:
            await asyncio.wait_for(reader.read(), 35)
            writer.close()
        closed = time.monotonic() - began
        ended = await until(lambda: one.metric("vllm:num_requests_running"), 0) - began
        for sock in unread:
            sock.close()
        ratio = statistics.median(during) / statistics.median(alone)
        cut = await one.metric("requests_aborted_total")
        found = {"others_x": round(ratio, 2), "closed_s": round(closed, 1)}
        found |= {"unread_ended_s": round(ended, 1), "unread_cut": cut}
    good = closed < 31 and ended < 31 and cut == len(unread) and ratio < 3
    return row("G7", "slow clients", good, found, seen)


def _deaf(port: int) -> socket.socket:
    """A client that asks for more than the buffers between hold, and reads none of it."""
    body = {"prompt": "x", "stream": True, "max_tokens": 900, "ignore_eos": True, "logprobs": 20}
    raw = json.dumps(body).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(f"{HEAD}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return sock


async def overload(asked: argparse.Namespace) -> Row:
    """G8: ten times what fits; the rest is refused at once, and what is served is no less."""
    flags = ("--limit-queue-requests", "16", "--rows", "8")
    async with served(asked, *flags) as one, health(one) as seen:
        began = time.monotonic()
        few = [_insist(one.port, began + asked.seconds / 2) for _ in range(16)]
        peak = [said for many in await asyncio.gather(*few) for said in many]
        fair = sum(said.done for said in peak) / (time.monotonic() - began)
        began = time.monotonic()
        each = [_insist(one.port, began + asked.seconds) for _ in range(80)]
        said = [one for many in await asyncio.gather(*each) for one in many]
        rate = sum(one.done for one in said) / (time.monotonic() - began)
        refused = [one for one in said if one.status == 429]
        slowest = max((said.seconds for said in refused), default=0)
        found = {
            "peak_per_s": round(fair, 1),
            "served_per_s": round(rate, 1),
            "refused": len(refused),
            "slowest_refusal_s": round(slowest, 2),
        }
        good = all(said.done for said in peak) and bool(refused) and rate >= 0.95 * fair
    return row("G8", "overload", good, found, seen)


async def _insist(port: int, end: float) -> list[Said]:
    """One client, again and again; when refused it waits as it was told to."""
    said = []
    while time.monotonic() < end:
        said.append(await ask(port, max_tokens=32))
        await asyncio.sleep(1 if said[-1].status == 429 else 0)
    return said


async def leaks(asked: argparse.Namespace) -> Row:
    """G10: bytes that a request leaves behind, when a third of them are left by their client."""
    async with served(asked) as one, health(one) as seen:
        rng, points = random.Random(1), []
        pids = [one.process.pid, one.engine()]
        for done in range(0, asked.requests, 50):
            leave = [rng.uniform(0, 0.05) if rng.random() < 0.3 else None for _ in range(50)]
            await asyncio.gather(*[ask(one.port, leave=seconds, max_tokens=4) for seconds in leave])
            points.append([done + 50, *map(_anonymous, pids)])
        half = list(zip(*points[len(points) // 2 :], strict=True))  # the first half warms up
        front, engine = (statistics.linear_regression(half[0], one).slope for one in half[1:])
        await asyncio.sleep(1)
        files = len(list(Path(f"/proc/{one.process.pid}/fd").iterdir()))
        found = {"front_bytes": round(front), "engine_bytes": round(engine), "files": files}
    return row("G10", "leaks", front + engine < 1000, found, seen)


def _cpu(pid: int) -> float:
    """Seconds that a process has computed since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    told = [line.split() for line in lines if line.startswith(("RssAnon", "VmSwap"))]
    return sum(int(words[1]) * 1024 for words in told)


GOALS: dict[str, Callable[[argparse.Namespace], Awaitable[Row]]] = {
    "G2": streams,
    "G3": cancels,
    "G4": deaths,
    "G5": drains,
    "G7": slow,
    "G8": overload,
    "G10": leaks,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a small model; nothing: the embedded one")
    parser.add_argument("--only", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--times", type=int, default=3, help="repetitions of deaths and drains")
    parser.add_argument("--rate", type=int, default=500, help="clients that leave, a second")
    parser.add_argument("--requests", type=int, default=3000, help="of the leak test")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.watch:
        watch(asked.watch)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    rows: list[Row] = []
    for goal in asked.only:
        print((GOALS[goal].__doc__ or "").splitlines()[0], flush=True)
        rows.append(asyncio.run(GOALS[goal](asked)))  # type: ignore[arg-type]
    finish("soak", rows, asked)
    return int(any(row["met"] != "True" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
