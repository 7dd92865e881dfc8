"""A server process of our own on loopback, from its start to its end."""

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from benchmarks import processes

HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


class Served:
    """The process, and what can be asked of it."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def raw(self, data: bytes) -> bytes:
        """All that comes back for these bytes; nothing when nobody listens."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return b""
        try:
            writer.write(data)
            return await reader.read()
        except OSError:
            return b""
        finally:
            writer.transport.abort()

    async def get(self, path: str) -> tuple[int, bytes]:
        said = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        data = await self.raw(said.encode())
        return status(data), data.partition(b"\r\n\r\n")[2]

    async def status(self, path: str) -> int:
        return (await self.get(path))[0]

    async def ready(self, seconds: float = 120) -> float:
        began = time.monotonic()
        while await self.status("/health/ready") != 200:
            if time.monotonic() - began > seconds or self.process.returncode is not None:
                raise SystemExit("the server does not come up")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    def children(self) -> list[int]:
        return processes.family(self.process.pid)[1:]

    def engine(self) -> int:
        """The child that runs the model."""
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.children()}
        return next(pid for pid, line in lines.items() if b"engine" in line)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> list[int]:
        """Bytes that the front and the engine have for themselves."""
        return [processes.anonymous(pid) for pid in (self.process.pid, self.engine())]

    def peak(self) -> int:
        """Bytes of all its processes at their most."""
        return sum(map(processes.peak, processes.family(self.process.pid)))

    def computed(self) -> list[float]:
        """Seconds that the front and the engine have computed since they began."""
        return [processes.seconds(pid) for pid in (self.process.pid, self.engine())]

    async def metric(self, name: str) -> float:
        _, page = await self.get("/metrics")
        lines = [line for line in page.decode().splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def status(data: bytes) -> int:
    """Of an answer; 0 when it is none."""
    return int(data[9:12]) if data.startswith(b"HTTP/1.1 ") else 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def served(asked: argparse.Namespace, *flags: str) -> AsyncIterator[Served]:
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *flags]
    command += ["--log-level", "error", *(["--model", asked.model] if asked.model else [])]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    made = Served(process, port)
    try:
        await made.ready()
        yield made
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait_for(process.wait(), 60)
