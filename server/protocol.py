"""HTTP/1.1 below the application, one connection: what uvicorn leaves open, closed.

- A request must arrive whole within a deadline, an unread answer is given up after another, and
  the head of a request has a size: a client can hold a connection only as long as we say.
- A message that two readers could understand differently (two lengths, a length and chunks, another
  coding than chunks, a bare CR, two hosts) gets one 400 and the end of the connection.
- An HTTP/1.0 client, which knows no chunks, gets none.
- These refusals are OpenAI's error objects too.
"""

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from server.api.shapes import encode
from server.config import Limits
from server.errors import BadMessage, Busy, HeadersTooLarge, KvistError, TooSlow, UrlTooLong
from server.pipe import Pipe, Together

WAITING = 16 << 10  # bytes that wait here for the kernel to take them; then an answer pauses
PIPELINED = 4  # requests that wait behind an answer; then nothing is read before it ends
PIECE = 256 << 10  # the most that one read brings: a head's end may lie anywhere in it


class Guarded(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[Limits] = Limits()
    most: ClassVar[int] = 4096  # connections

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.timeout_keep_alive = self.limits.idle_timeout  # type: ignore[assignment]
        self._arrival = Timer(self.loop)  # a request is coming in
        self._unread = Timer(self.loop)  # an answer is not going out
        self._in_head = True
        self._begun = False  # something of a request came
        self._fed = 0  # bytes since the last head was complete
        self._size = 0  # bytes of the headers of this request
        self._wrong: KvistError | None = None
        self._under_way: RequestResponseCycle | None = None  # `cycle` is the newest, and may wait

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(WAITING)
        self._pipe = Pipe(transport, self.flow)
        self._arrival.start(self.limits.idle_timeout, self._too_slow)
        if len(self.connections) > self.most:
            self._refuse(Busy("This server has as many connections as it takes."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrival.stop()
        self._unread.stop()
        super().connection_lost(exc)
        if self._under_way is not None:
            self._under_way.disconnected = True
            self._under_way.message_event.set()
        self._pipe.lose()

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._wrong is not None or self.transport.is_closing():
            return
        if self._in_head:
            self._fed += len(data)
            if self._fed > self.limits.header_bytes + self.limits.url_bytes + PIECE:
                self._refuse(self._too_large())
                return
        if not self._arrival.runs and not self._answering:
            self._arm()
        self._unset_keepalive_if_required()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _decline(self, rest: bytes) -> None:
        """Some clients offer another protocol with each request (Java: h2c); the parser then takes
        the body for that protocol. Read the request again without the offer."""
        kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in kept)
        head = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n" + lines
        self.parser = httptools.HttpRequestParser(self)
        self._feed(head + b"\r\n" + rest)

    def on_message_begin(self) -> None:
        self._in_head, self._begun, self._fed, self._size = True, True, 0, 0
        self._arm()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.url_bytes:
            self._raise(UrlTooLong(f"The URL is longer than {self.limits.url_bytes} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._size += len(name) + len(value) + 4
        if self._size > self.limits.header_bytes or len(self.headers) > self.limits.headers:
            self._raise(self._too_large())

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._raise(BadMessage(f"This server speaks HTTP/1.1, and the request HTTP/{version}."))
        new = version == "1.1"
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and new):
            self._raise(BadMessage(f"The request has {hosts} Host headers, but must have one."))
        if not new:
            self.expect_100_continue = False  # which an older client takes for the answer
        coded = [value for name, value in self.headers if name == b"transfer-encoding"]
        if coded and not (new and len(coded) == 1 and coded[0].strip().lower() == b"chunked"):
            self._raise(BadMessage("The only transfer coding is 'chunked', once, in HTTP/1.1."))
        if self.parser.get_method() == b"CONNECT":
            self._raise(BadMessage("This server is no proxy."))
        if not self.parser.should_upgrade():
            if new:
                self.scope["state"]["pipe"] = self._pipe
            self._in_head, self._fed = False, 0
            super().on_headers_complete()
            if 0 < len(self.pipeline) < PIPELINED:
                self.flow.resume_reading()  # else it is not heard when the client goes

    def on_body(self, body: bytes) -> None:
        self._fed += len(body)
        if self._fed > 16 * self.limits.body_bytes:  # long refused, and still it comes
            self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._arrival.stop()
        self._in_head, self._begun, self._fed = True, False, 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._under_way = cycle
        if cycle.scope["method"] != "HEAD":  # which has a head alone
            cycle.transport = Together(self.transport)  # type: ignore[assignment]
        old = cycle.scope["http_version"] != "1.1"
        super()._start_asgi_task(cycle, _unframed(cycle, app) if old else app)

    def _arm(self) -> None:
        self._arrival.start(self.limits.receive_timeout, self._too_slow)

    def _too_slow(self) -> None:
        if self._answering:
            return  # a pipelined request waits for us, not we for it
        if self._begun:
            seconds = self.limits.receive_timeout
            self._refuse(TooSlow(f"The request did not arrive within {seconds:g} seconds."))
        else:
            self._close()

    def _too_large(self) -> KvistError:
        most, size = self.limits.headers, self.limits.header_bytes
        return HeadersTooLarge(f"There are more than {most} headers, or {size} bytes of them.")

    # What is refused

    @property
    def _answering(self) -> bool:
        """A request that came whole is being answered."""
        return self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)

    def _raise(self, error: KvistError) -> None:
        """Out of the parser's callback, to `send_400_response`."""
        self._wrong = error
        raise error

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        wrong, self._wrong = self._wrong, None
        self._refuse(wrong or BadMessage("This is not an HTTP/1.1 request as it must be."))

    def _refuse(self, error: KvistError) -> None:
        """One answer and the end; an answer under way goes out first, and is the last."""
        self._wrong = error
        self._arrival.stop()
        if self._answering:
            assert self._under_way is not None
            self._under_way.keep_alive = False
            self.pipeline.clear()
            self.flow.pause_reading()
            return
        begun = self.cycle is not None and self.cycle.more_body and self.cycle.response_started
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not begun:
            self.transport.write(_raw(error))
        self._close()

    # What goes out

    def pause_writing(self) -> None:
        super().pause_writing()
        self._give_up_later()

    def resume_writing(self) -> None:
        self._unread.stop()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._give_up_later()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
        self._give_up_later()

    def _give_up_later(self) -> None:
        """A client that reads nothing is not waited for."""
        self._unread.start(self.limits.unread_seconds, self.transport.abort)


def _unframed(cycle: RequestResponseCycle, app: Any) -> Any:
    """This application, whose answer has no chunks: the end of the connection ends it."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            cycle.chunked_encoding = False
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_on)

    return run


class Timer:
    """Something to do later, unless it is put off or stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, then: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, self._ring, then)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self, then: Callable[[], None]) -> None:
        self._handle = None
        then()


def _raw(error: KvistError) -> bytes:
    body = encode(error.body())
    head = (
        b"content-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n" % len(body)
    )
    return STATUS_LINE[error.status] + head + body
