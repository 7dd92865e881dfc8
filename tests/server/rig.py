"""The real application behind the real listener on loopback, with a fake engine behind it."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from server.api.app import build
from server.api.front import Front
from server.api.keys import Keys
from server.api.served import Served
from server.config import Limits, Settings
from server.listen import Server, bind, configure
from server.metrics import Metrics
from tests.server.fakes import EOS, FakeEngine, FakeTemplate, FakeWords


class Rig:
    """A running server: where it is, and what is inside."""

    def __init__(self, front: Front, engine: FakeEngine, server: Server, port: int) -> None:
        self.front = front
        self.engine = engine
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.loop: asyncio.AbstractEventLoop | None = None

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def raw(self, data: bytes) -> bytes:
        """All that comes back for these bytes until the server closes."""
        with self.connect() as one:
            with suppress(OSError):  # refused before all of it was sent
                one.sendall(data)
                one.shutdown(socket.SHUT_WR)
            return read_all(one)


def read_all(one: socket.socket) -> bytes:
    parts = []
    while True:
        try:
            part = one.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def served(settings: Settings, **changes: Any) -> Served:
    made = Served(
        names=("tiny", "alias"),
        words=FakeWords(),
        template=FakeTemplate(),
        context=4096,
        vocabulary=FakeWords.vocabulary,
        capacity=8192,
        eos=(EOS,),
        created=1,
        fingerprint="fp",
        limits=settings.limits,
    )
    return replace(made, **changes)


def front(settings: Settings, engine: FakeEngine, **changes: Any) -> Front:
    made = Front(settings, engine, Metrics("tiny", "test"), Keys(settings.api_keys))
    made.served = served(settings, **changes)
    made.metrics.watch(engine)
    return made


@contextmanager
def running(settings: Settings | None = None, **changes: Any) -> Iterator[Rig]:
    """A server in a thread, for as long as the block lasts."""
    settings = settings or Settings(shutdown_timeout=5)
    engine = FakeEngine()
    made = front(settings, engine, **changes)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = configure(build(made), made)
        rig = Rig(made, engine, server, port)
        thread = threading.Thread(target=_run, args=(rig, listener), daemon=True)
        thread.start()
        try:
            yield rig
        finally:
            server.should_exit = True
            thread.join(10)
            made.pool.close()
    assert not thread.is_alive()
    assert not engine.running, "a request was left behind"
    assert not made.running


def _run(rig: Rig, listener: socket.socket) -> None:
    async def main() -> None:
        rig.loop = asyncio.get_running_loop()
        await rig.server.serve([listener])

    with asyncio.Runner(loop_factory=rig.server.config.get_loop_factory()) as runner:
        runner.run(main())


def limits(**some: Any) -> Settings:
    return Settings(limits=Limits(**some), shutdown_timeout=5)
