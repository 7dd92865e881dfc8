"""The front's sockets, signals and end.

SIGTERM drains: not ready at once, no new connections, running answers finish until a timeout, then
each is told; the process ends with 0. A second signal ends it at once.
"""

import asyncio
import resource
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

from server.api.front import Front
from server.config import Limits
from server.protocol import Guarded

# Bytes that the kernel keeps for a client; by itself it would take megabytes. A stream's tokens are
# some 200 bytes each: a client that reads nothing is noticed after 400 of them, and one that is 0.3
# seconds away can still be sent 200 kB a second.
UNREAD = 64 << 10
EARS = 16  # connections taken in a turn of the event loop, at most
FAREWELL = 2.0  # seconds for the last error events to leave
SPARE = 64 + 4 * EARS  # file descriptors that are not connections, or not yet refused


def allowed_connections(limits: Limits) -> int:
    """As many as asked for, as far as file descriptors go."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(limits.connections, soft - SPARE))


class Server(uvicorn.Server):
    """One front process: its sockets, its signals, its end."""

    def __init__(self, config: uvicorn.Config, front: Front) -> None:
        super().__init__(config)
        self._front = front

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains, the second ends; neither is raised again afterwards."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """libuv takes one connection a socket in each turn of the loop, and with many streams a
        turn is milliseconds long: so each socket gets copies, which take from the same queue."""
        self._copies = [one.dup() for one in sockets or [] for _ in range(EARS - 1)]
        await super().startup(sockets and [*sockets, *self._copies])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._front.draining = True
        await self._wait(self._front.settings.drain_lag, lambda: False)
        self._front.closed = True
        for server in self.servers:
            server.close()
        for one in [*(sockets or []), *self._copies]:
            one.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._wait(self._front.settings.shutdown_timeout, self._idle)
        for task in list(self._front.running):
            task.cancel()
        self.force_exit = False
        await self._wait(FAREWELL, self._idle)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _idle(self) -> bool:
        return not self.server_state.tasks and not self.server_state.connections

    async def _wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.force_exit and not enough():
            await asyncio.sleep(0.02)


def configure(app: Any, front: Front, **more: Any) -> Server:
    """The server of this application, with the protocol that keeps its limits."""
    settings = front.settings
    own = {"limits": settings.limits, "most": allowed_connections(settings.limits)}
    protocol = type("Guarded", (Guarded,), own)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        backlog=2048,
        ssl_certfile=settings.tls_cert and str(settings.tls_cert),
        ssl_keyfile=settings.tls_key and str(settings.tls_key),
        **more,
    )
    return Server(config, front)


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before anything slow is done; raises OSError when it is taken."""
    found: Sequence[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # connections inherit it
    made.bind(address)
    made.listen(2048)
    made.setblocking(False)
    return made
