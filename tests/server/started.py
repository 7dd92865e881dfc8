"""A whole server as a process of our own, with a real engine: to test how it starts and ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

FLAGS = ["--threads", "1", "--pages", "2048", "--log", "json", "--device", "cpu"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}


class Process:
    """A server of our own, by its pid."""

    def __init__(self, *arguments: str, port: int | None = None) -> None:
        self.port = port or free_port()
        command = [sys.executable, "-m", "server", "serve", *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *FLAGS], stderr=subprocess.PIPE, text=True, env=ENVIRON
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def get(self, path: str) -> int:
        return get(self.port, path)

    def wait_ready(self) -> None:
        until(lambda: self.process.poll() is not None or self.get("/health/ready") == 200, 60)
        assert self.process.poll() is None, "".join(self.lines)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = 30) -> int:
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    @property
    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task")
        texts = [(task / "children").read_text() for task in tasks.iterdir()]
        return [int(pid) for text in texts for pid in text.split()]


def get(port: int, path: str) -> int:
    """The status of a path; 0 when nobody listens."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except ConnectionError:
        return 0
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(true: Any, seconds: float = 20) -> None:
    tick, end = threading.Event(), time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        tick.wait(0.02)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=ENVIRON, check=False, **more
    )


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
