"""An answer under way: the engine's events, until they end, fail, or nobody listens any more.

Streaming is the only path. A plain answer is the fold of the same deltas; both are responses that
hear when the client goes, and then leave the engine's loop, which cancels the request there.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.answer import Answer, Delta, fold
from server.api.front import Engine, Front
from server.api.replies import BROKEN
from server.api.shapes import Shape, encode, event
from server.engine.request import Event, Request
from server.errors import Cancelled, Draining, KvistError, from_code
from server.metrics import Meter

QUIET = 15.0  # seconds until a comment says that the stream is alive
STOPPED = "The server stopped before the answer was complete."
log = logging.getLogger("kvist.api")


Numbered = AsyncGenerator[tuple[int, Event], None]


async def events(engine: Engine, requests: list[Request]) -> Numbered:
    """The events of all prompts as they come, each with its prompt's number."""
    if len(requests) == 1:
        async with aclosing(_stream(engine, requests[0])) as stream:
            async for one in stream:
                yield 0, one
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(len(requests))
    tasks = [asyncio.create_task(_feed(engine, *pair, queue)) for pair in enumerate(requests)]
    try:
        left = len(requests)
        while left:
            number, got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                left -= 1
            else:
                yield number, got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stream(engine: Engine, request: Request) -> AsyncGenerator[Event, None]:
    stream: Any = engine.stream(request)
    async with aclosing(stream):
        async for one in stream:
            if one.error is not None:
                raise from_code(one.code, one.error)
            yield one


async def _feed(
    engine: Engine,
    number: int,
    request: Request,
    queue: "asyncio.Queue[tuple[int, Event | BaseException | None]]",
) -> None:
    try:
        async with aclosing(_stream(engine, request)) as stream:
            async for one in stream:
                await queue.put((number, one))
    except Exception as error:
        await queue.put((number, error))
    else:
        await queue.put((number, None))


class Reply(Response):
    """What both answers share: the work runs as long as the client listens."""

    def __init__(self, front: Front, answer: Answer, shape: Shape, meter: Meter) -> None:
        self.front = front
        self.answer = answer
        self.shape = shape
        self.meter = meter
        self.failed = ""  # by which error, after the first byte
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.front.running.add(task)
        scope["state"] |= {"answer": self.answer, "meter": self.meter}
        try:
            await self.answer_to(receive, send)
        except asyncio.CancelledError:
            raise Draining(STOPPED) from None  # only a server that stops cancels answers
        finally:
            self.front.running.discard(task)
            if self.failed:
                scope["state"]["error"] = self.failed

    async def answer_to(self, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def deltas(self) -> AsyncGenerator[tuple[Event, Iterator[Delta]], None]:
        requests = self.answer.asked.requests
        async with aclosing(events(self.front.engine, requests)) as stream:
            async for number, one in stream:
                self.meter.event(one)
                yield one, self.answer.push(number, one)


class Plain(Reply):
    """The whole answer at once."""

    async def answer_to(self, receive: Receive, send: Send) -> None:
        deltas: list[Delta] = []
        async with heard(receive), aclosing(self.deltas()) as stream:
            async for _, some in stream:
                deltas += some
        self.meter.end()
        body = encode(self.shape.answer_body(fold(self.answer, deltas)))
        await Response(body, media_type="application/json")({"type": "http"}, receive, send)


class Stream(Reply):
    """Server-sent events. They begin with the first token, or when it is long in coming."""

    def __init__(self, front: Front, answer: Answer, shape: Shape, meter: Meter) -> None:
        super().__init__(front, answer, shape, meter)
        self.begun = False
        self.quiet = True
        self.tree = TreeEvents(answer)

    async def answer_to(self, receive: Receive, send: Send) -> None:
        try:
            async with heard(receive, lambda: self._beat(send)), aclosing(self.deltas()) as stream:
                async for one, some in stream:
                    data = self.tree.of(one) + b"".join(map(self.shape.chunk, some))
                    if data:
                        await self._send(send, data)
                await self._send(send, self.shape.last())
            self.meter.end()
        except KvistError as error:
            await self._fail(send, error)
        except asyncio.CancelledError:
            await self._fail(send, Draining(STOPPED))
        except Exception as error:
            if not self.begun:
                raise
            log.exception("stream failed", exc_info=error)
            await self._fail(send, KvistError(BROKEN))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, error: KvistError) -> None:
        """Before the first byte an error is a status, after it an event, with no [DONE]."""
        if not self.begun:
            raise error
        self.front.metrics.rejected(error.code)
        self.failed = error.code
        await self._send(send, event(error.body()))

    async def _send(self, send: Send, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.quiet = False
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _beat(self, send: Send) -> None:
        if self.quiet:
            await self._send(send, b": waiting\n\n")
        self.quiet = True


class TreeEvents:
    """The steps of a beam search as named events, at most so many a second."""

    def __init__(self, answer: Answer) -> None:
        stream = answer.asked.body.beam_stream
        self._every = 1 / stream.max_events_per_s if stream else 0.0
        self._next = 0.0
        self._held: list[bytes] = []

    def of(self, one: Event) -> bytes:
        """What may go out now; what may not waits, and nothing is lost."""
        if one.tree:
            self._held += one.tree.splitlines()
        now = asyncio.get_running_loop().time() if self._held else 0.0
        if not self._held or (now < self._next and not one.done):
            return b""
        lines, self._held = self._held, []
        self._next = now + self._every * len(lines)
        return b"".join(b"event: beam\ndata: " + line + b"\n\n" for line in lines)


@asynccontextmanager
async def heard(
    receive: Receive, beat: Callable[[], Awaitable[None]] | None = None
) -> AsyncGenerator[None, None]:
    """Run what is inside until the client goes; then it ends with Cancelled."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def listen() -> None:
        nonlocal gone
        while not gone:
            try:
                message = await asyncio.wait_for(receive(), QUIET)
                gone = message["type"] == "http.disconnect"
            except TimeoutError:
                if beat is not None:
                    await beat()
        task.cancel()

    listener = asyncio.create_task(listen())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise Cancelled("The client closed the connection.") from None
    finally:
        listener.cancel()
