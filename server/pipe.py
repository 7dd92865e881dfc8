"""Past ASGI: how an answer goes out, its head with its first bytes, and what follows of a body
under way a chunk at a time and at once; and how it is heard that the client went.

A token of a stream is worth 20 microseconds at 64 streams a step, and each layer that a message
walks through takes one. So the connection offers its pipe to the application
(`scope["state"]["pipe"]`); where there is none, or the client lags, the answer goes out as ASGI's
messages.
"""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

CONTINUE = b"HTTP/1.1 100 "  # comes before the head


class Pipe:
    """One connection's."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow
        self._lost = False
        self.leave: Callable[[], None] | None = None  # whom to call when the client goes

    def hear(self, leave: Callable[[], None]) -> bool:
        """Have it called when the client goes; False when it did."""
        self.leave = leave
        if not self._lost:
            self._flow.resume_reading()  # what is not read does not end
        return not self._lost

    def lose(self) -> None:
        """The connection is no more."""
        self._lost = True
        if self.leave is not None:
            self.leave()

    @property
    def flows(self) -> bool:
        """Whether the client takes what it is sent."""
        return not self._flow.write_paused

    def send(self, data: bytes) -> None:
        """A chunk of a body whose length was not told, when its head went out before."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class Together:
    """The connection as an answer writes to it: the head waits for the first bytes of the body,
    which come in the same breath. Alone it would be one packet more, and wake the client twice."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # empty when it is gone
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head is None and not data.startswith(CONTINUE):
            self._head = data
            return
        self._transport.write((self._head or b"") + data)
        self._head = self._head and b""

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
        self._transport.close()
