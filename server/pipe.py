"""Past ASGI: how the body of an answer under way goes out, a chunk at a time and at once.

A token of a stream is worth 20 microseconds at 64 streams a step, and each layer that a message
walks through takes one. So the connection offers its pipe to the application
(`scope["state"]["pipe"]`); where there is none, or the client lags, the answer goes out as ASGI's
messages.
"""

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl


class Pipe:
    """One connection's."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    @property
    def flows(self) -> bool:
        """Whether the client takes what it is sent."""
        return not self._flow.write_paused

    def send(self, data: bytes) -> None:
        """A chunk of a body whose length was not told, when its head went out before."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
