"""The whole server as a process, when what is around it fails: disks, files, signals, itself."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from server.listen import bind
from tests.server.started import ENVIRON, FLAGS, Process, alive, cpu, free_port, get, until
from tests.server.tiny import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model") / "tiny")


@contextmanager
def serving(folder: Path, stderr: int, *before: str, **environ: str) -> Iterator[tuple[int, int]]:
    """Its pid and port; it ends with 0."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", str(folder), "--port", str(port), *FLAGS]
    made = subprocess.Popen([*before, *command], stderr=stderr, env=ENVIRON | environ)
    try:
        until(lambda: made.poll() is not None or get(port, "/health/ready") == 200, 60)
        yield made.pid, port
    finally:
        made.terminate()
    assert made.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_logs_that_cannot_be_written_do_not_stop_it(folder: Path, full: bool) -> None:
    """T77: a pipe that nobody reads any more; a disk without room, and no place for a cache."""
    reads, pipe = os.pipe()
    os.close(reads)
    with open("/dev/full", "wb") as disk, os.fdopen(pipe, "wb") as nowhere:
        stderr = disk if full else nowhere
        more = {"XDG_CACHE_HOME": "/dev/null/cache"} if full else {}
        with serving(folder, stderr.fileno(), **more) as (_, port):
            assert [get(port, "/version") for _ in range(20)] == [200] * 20


@pytest.mark.slow
def test_more_clients_than_files(folder: Path) -> None:
    """T79: those above are told so, and when the first have left there is room again."""
    few = ("prlimit", "--nofile=256:256", "--")
    with serving(folder, subprocess.DEVNULL, *few) as (pid, port):
        with ExitStack() as stack:
            held = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
                for _ in range(400)
            ]
            assert b"429" in held[-1].recv(200)
            before = cpu(pid)
            threading.Event().wait(1)
            assert cpu(pid) - before < 0.9, "it spins"
        until(lambda: get(port, "/health/ready") == 200)


@pytest.mark.slow
def test_nothing_outlives_a_killed_front(folder: Path) -> None:
    """T62: the engine and whatever else it started end, and its port is free."""
    made = Process(str(folder))
    made.wait_ready()
    children = made.children
    assert children
    assert made.end(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not any(map(alive, children)), 5)
    bind("127.0.0.1", made.port).close()


LOOP = """
import sys
from server import serve
from server.config import Settings
from server.engine import process
process.BACK_OFF = 0.001
serve.Blueprint = lambda options: process.Blueprint(build="tests.server.simulation.build:crash")
sys.exit(serve.run(Settings(port=0)))
"""


def test_a_server_whose_engine_never_lives_gives_up() -> None:
    """T63: five deaths, one sentence, and an exit status that says so."""
    root = Path(__file__).parents[2]
    got = subprocess.run(
        [sys.executable, "-c", LOOP], cwd=root, capture_output=True, text=True, check=False
    )
    assert got.returncode == 1
    assert "died 5 times" in got.stderr.splitlines()[-1]
    assert "Traceback" not in got.stderr
