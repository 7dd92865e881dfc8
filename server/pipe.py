"""Past ASGI: how the body of an answer under way goes out, a chunk at a time and at once.

A token of a stream is worth 20 microseconds at 64 streams a step; each layer that a message walks
through takes one, and uvloop writes at the end of its turn, when all others had theirs. So the
connection offers its pipe to the application (`scope["state"]["pipe"]`); where there is none, or
the client lags, the answer goes out as ASGI's messages.
"""

import asyncio
import os
from contextlib import suppress

from uvicorn.protocols.http.flow_control import FlowControl


class Pipe:
    """One connection's."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow
        sock = transport.get_extra_info("socket")
        bare = transport.get_extra_info("ssl_object") is None and sock is not None
        self._fd: int = sock.fileno() if bare else -1

    @property
    def flows(self) -> bool:
        """Whether the client takes what it is sent."""
        return not self._flow.write_paused

    def send(self, data: bytes) -> None:
        """A chunk of a body whose length was not told, when its head went out before."""
        data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._transport.is_closing():
            return
        if self._fd >= 0 and not self._transport.get_write_buffer_size():
            with suppress(OSError):  # full, or gone: the transport finds out, and what to do
                data = data[os.write(self._fd, data) :]
        if data:
            self._transport.write(data)
