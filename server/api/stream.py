"""An answer under way: the engine's events, until they end, fail, or nobody listens any more.

Streaming is the only path. A plain answer is the fold of the same deltas; both are responses that
hear when the client goes, and then leave the engine's inboxes, which cancels the requests there.

An event is heard in the same breath in which the engine's client has it, while nothing stands
before it: to wake this answer's task, a dozen frames deep in the framework, costs as much as all
that is done for a token. The task waits for what cannot be so: the first word, a client that lags,
a failure, the end.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.answer import Answer, Delta, fold
from server.api.front import Front
from server.api.replies import BROKEN
from server.api.shapes import Shape, encode, event
from server.engine.registry import Inbox
from server.engine.request import Event
from server.errors import Cancelled, Draining, KvistError, from_code
from server.metrics import Meter
from server.pipe import Pipe

QUIET = 15.0  # seconds until a comment says that the stream is alive
ALIVE = b": waiting\n\n"
STOPPED = "The server stopped before the answer was complete."
log = logging.getLogger("kvist.api")


class Reply(Response):
    """What both answers share: the work runs as long as the client listens."""

    def __init__(self, front: Front, answer: Answer, shape: Shape, meter: Meter) -> None:
        self.front = front
        self.answer = answer
        self.shape = shape
        self.meter = meter
        self.failed = ""  # by which error, after the first byte
        self.background = None
        self.pipe: Pipe | None = None
        self._inboxes: dict[int, Inbox] = {}  # of the prompts that are not answered yet
        self._loop = asyncio.get_running_loop()
        self._said = self._loop.time()  # the last time that something was sent
        self._woken: asyncio.Future[None] | None = None  # the task waits for it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.front.running.add(task)
        scope["state"] |= {"answer": self.answer, "meter": self.meter}
        self.pipe = scope["state"].get("pipe")
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

    @property
    def open(self) -> bool:
        """Whether what is heard may go out in the same breath."""
        raise NotImplementedError

    def say(self, number: int, one: Event) -> bytes:
        """What an event of a prompt adds to the body that is going out."""
        raise NotImplementedError

    async def words(self, receive: Receive, give: Callable[[bytes], Awaitable[None]]) -> None:
        """Give what is to be sent and did not go through the pipe, while the client listens."""
        with Heard(receive, self.pipe), ExitStack() as stack:
            for number, request in enumerate(self.answer.asked.requests):
                inbox = self._inboxes[number] = stack.enter_context(self.front.engine.open(request))
                inbox.wake = partial(self._wake, number, inbox)
            while self._inboxes:
                if not any(inbox.unread for inbox in self._inboxes.values()):
                    await self._wait()
                data = b"".join([self._hear(*pair) for pair in list(self._inboxes.items())])
                now = self._loop.time()
                if data or now >= self._said + QUIET:
                    self._said = now
                    await give(data or ALIVE)

    async def _wait(self) -> None:
        """Until something could not be heard as it came, or nothing came for long."""
        self._woken = woken = self._loop.create_future()
        timer = self._loop.call_at(self._said + QUIET, _end, woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._woken = None
        await self.front.going.mine()

    def _wake(self, number: int, inbox: Inbox) -> None:
        """The engine's client has something. What fails here is this answer's alone."""
        woken = self._woken
        if woken is None or woken.done():
            return  # the task is awake and will see it
        try:
            if self.open:
                data = self._hear(number, inbox)
                if data and self.pipe is not None:
                    self.pipe.send(data)
                    self._said = self._loop.time()
                if self._inboxes:
                    return
            woken.set_result(None)
        except Exception as error:
            woken.set_exception(error)
            woken.exception()  # seen: the task may have left meanwhile

    def _hear(self, number: int, inbox: Inbox) -> bytes:
        """What is to be sent of what is new."""
        one = inbox.take()
        if one is None:
            return b""
        if one.error is not None:
            raise from_code(one.code, one.error)
        if one.done:
            del self._inboxes[number]
        self.meter.event(one)
        return self.say(number, one)


def _end(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


class Plain(Reply):
    """The whole answer at once."""

    open = True

    def __init__(self, front: Front, answer: Answer, shape: Shape, meter: Meter) -> None:
        super().__init__(front, answer, shape, meter)
        self._deltas: list[Delta] = []

    def say(self, number: int, one: Event) -> bytes:
        self._deltas += self.answer.push(number, one)
        return b""

    async def answer_to(self, receive: Receive, send: Send) -> None:
        await self.words(receive, _keep)
        self.meter.end()
        body = encode(self.shape.answer_body(fold(self.answer, self._deltas)))
        await Response(body, media_type="application/json")({"type": "http"}, receive, send)


class Stream(Reply):
    """Server-sent events. They begin with the first token, or when it is long in coming."""

    def __init__(self, front: Front, answer: Answer, shape: Shape, meter: Meter) -> None:
        super().__init__(front, answer, shape, meter)
        self.begun = False
        told = answer.asked.body.beam_stream
        self.tree = TreeEvents(told.max_events_per_s) if told else None

    @property
    def open(self) -> bool:
        return self.begun and self.pipe is not None and self.pipe.flows

    def say(self, number: int, one: Event) -> bytes:
        word = self.answer.word(number, one) if self.tree is None else None
        if word is not None:
            return self.shape.word(*word)
        said = b"".join([self.shape.chunk(delta) for delta in self.answer.push(number, one)])
        return self.tree.of(one) + said if self.tree else said

    async def answer_to(self, receive: Receive, send: Send) -> None:
        try:
            await self.words(receive, partial(self._send, send))
            last = self.shape.last()
            self.meter.end()
        except KvistError as error:
            last = self._fail(error)
        except asyncio.CancelledError:
            last = self._fail(Draining(STOPPED))
        except Exception as error:
            last = self._fail(KvistError(BROKEN), error)
        await self._send(send, last, more=False)

    def _fail(self, error: KvistError, cause: Exception | None = None) -> bytes:
        """Before the first byte an error is a status, after it an event, with no [DONE]."""
        if not self.begun:
            raise cause or error
        if cause is not None:
            log.exception("stream failed", exc_info=cause)
        self.front.metrics.rejected(error.code)
        self.failed = error.code
        return event(error.body())

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self.begun:
            self.begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})


class TreeEvents:
    """The steps of a beam search as named events, at most so many a second."""

    def __init__(self, most: float) -> None:
        self._every = 1 / most
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


class Heard:
    """Run what is inside until the client goes; then it ends with Cancelled. To hear it from ASGI
    takes a task of its own."""

    def __init__(self, receive: Receive, pipe: Pipe | None = None) -> None:
        self._receive = receive
        self._pipe = pipe
        self._gone = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._pipe is None:
            self._listener = asyncio.create_task(self._listen())
        elif not self._pipe.hear(self._leave):
            raise _left()

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        if self._pipe is None:
            self._listener.cancel()
        else:
            self._pipe.leave = None
        if self._gone and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise _left() from None


def _left() -> Cancelled:
    return Cancelled("The client closed the connection.")


async def _keep(data: bytes) -> None:
    """A plain answer waits for all its words."""
