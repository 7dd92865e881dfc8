"""The engine in a process of its own, and the client that the API awaits.

One AF_UNIX socket pair joins the two; messages are msgpack, checked against their schema (wire.py);
all events of a step cross in one. A stamp in shared memory tells that the engine is alive
(heart.py). When it dies or hangs, each request it had ends with one error event, and a new engine
is started, later each time; after five deaths in five minutes, no more.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import msgspec

from server.engine.heart import Heart
from server.engine.registry import Inbox, Registry, last_words
from server.engine.request import Request, Stats
from server.engine.wire import (
    Answer,
    Ask,
    Blueprint,
    Cancel,
    Dead,
    Heard,
    Ready,
    Submit,
    ToEngine,
    ToFront,
    frame,
    to_front,
)
from server.errors import EngineDown, KvistError, from_code

__all__ = ["Blueprint", "Client", "Health", "State"]

log = logging.getLogger(__name__)
State = Literal["loading", "ready", "hung", "down", "failed", "stopped"]

Hear = Callable[["Child", ToFront], None]

WATCH = 0.25  # seconds between two looks at the heart
HANGING = 30.0  # seconds that an engine may hang before it is replaced
DEATHS, WITHIN = 5, 300.0  # so many in so many seconds, and nothing is started any more
BACK_OFF = 0.1  # seconds before the first restart, doubling with each death
ROOT = Path(__file__).parents[2]  # where `server` is imported from


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What the heartbeat says. Serving is possible in `ready` only."""

    state: State
    age: float  # seconds since the engine's last sign of life
    restarts: int  # engines started after the first
    reason: str = ""  # why it is not ready, a sentence

    @property
    def ready(self) -> bool:
        return self.state == "ready"


class Child:
    """One engine process, from its start to its end."""

    def __init__(self, blueprint: Blueprint, heart: Heart) -> None:
        heart.beat(3600.0)  # until it beats itself
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "server.engine.worker", str(theirs.fileno()), str(heart.fd)],
                pass_fds=(theirs.fileno(), heart.fd),
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                process_group=0,  # a Ctrl-C in the terminal is for the front alone
            )
        self.line: asyncio.Transport | None = None
        self.blueprint = blueprint
        self.ready = False
        self.last_words: Dead | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def listen(self, hear: Hear) -> None:
        """Pass on what it says until its end of the line is closed."""
        loop, ear = asyncio.get_running_loop(), Ear(partial(hear, self))
        self.line, _ = await loop.create_unix_connection(lambda: ear, sock=self.socket)
        self.send(self.blueprint)
        try:
            await ear.over
        finally:
            self.line.close()

    def send(self, message: ToEngine) -> None:
        if self.line is not None and not self.line.is_closing():
            self.line.write(frame(message))

    async def end(self, seconds: float) -> int:
        """Hang up, wait, and kill it if that does not help; its exit status."""
        if self.line is None:  # it has not even heard what to build
            self.kill()
        else:
            self.line.close()
        until = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.kill()
        while (status := self._process.poll()) is None:
            await asyncio.sleep(0.02)
        if self.line is None:
            self.socket.close()
        return status

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()


class Ear(asyncio.Protocol):
    """Hears a message in the breath in which it comes. Where we lag, it hears one a turn of the
    event loop, so that readers get to read between two steps, and the engine is kept waiting."""

    def __init__(self, hear: Callable[[ToFront], None]) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hear = hear
        self._frames = to_front()
        self._heard: deque[ToFront] = deque()

    def connection_made(self, line: asyncio.Transport) -> None:  # type: ignore[override]
        self._line = line

    def data_received(self, data: bytes) -> None:
        try:
            self._heard += self._frames.feed(data)
            if self._heard:
                self._hear(self._heard.popleft())
        except Exception:
            log.exception("The engine's line broke")
            self._line.abort()
        if self._heard:
            self._line.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if not self._line.is_closing():
            self._line.resume_reading()
            self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            log.error("The engine's line broke: %s", error)
        if not self.over.done():
            self.over.set_result(None)


class Client:
    """The engine process as seen from the event loop that started it."""

    def __init__(self, blueprint: Blueprint, *, unread: int = 256) -> None:
        """`unread`: how many events a reader may lag behind before its request is cut off."""
        self.info: dict[str, Any] = {}  # what the engine says of itself: model, device, pages, …
        self._blueprint = blueprint
        self._registry = Registry(unread)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()
        self._stats = Stats()
        self._state: State = "down"
        self._reason = "The engine was not started."
        self._children = 0
        self._child: Child | None = None
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        self._stale = 0  # looks in a row at a heart that does not beat

    async def start(self) -> None:
        """Start the engine and wait until it is ready; raises what keeps it from that."""
        loop = asyncio.get_running_loop()
        self._heart = Heart()
        self._started: asyncio.Future[None] = loop.create_future()
        self._gave_up: asyncio.Future[str] = loop.create_future()
        self._supervisor = loop.create_task(self._supervise())
        await self._started

    async def stop(self, timeout: float = 5.0) -> None:
        """End the engine; what still runs gets an error event. Never raises, may be repeated."""
        if self._state == "stopped":
            return
        self._set("stopped", "The server is stopping.")
        self._fail()
        if self._child is not None:
            await self._child.end(timeout)
        if self._children:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._heart.close()
            if not self._started.done():
                self._started.set_exception(EngineDown(self._reason))

    @contextmanager
    def open(self, request: Request) -> Iterator[Inbox]:
        """Where the request's events come in, the last with `done`. Leaving early cancels.

        A request that is refused or fails ends with one event whose `error` and `code` are set;
        `errors.from_code` makes the exception of it. A reader that lags gets what came meanwhile
        as one event; one that lags more than `unread` events behind is cut off (`slow_client`).
        """
        inbox = self._registry.open(request.id)
        try:
            if self._state != "ready":
                inbox.put(last_words(request.id, EngineDown(self._reason)))
            else:
                self._send(Submit(request))
            yield inbox
        finally:
            inbox.wake = None
            if self._registry.close(inbox):
                self._send(Cancel(request.id))

    def cancel(self, id: str) -> None:
        """End the request in whatever state; its stream gets a last event with `cancelled`."""
        self._send(Cancel(id))

    async def ask(self, what: str, **arguments: Any) -> Any:
        """Call one of the engine's `answers` between two steps (embeddings, explanations)."""
        if self._state != "ready":
            raise EngineDown(self._reason)
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ask(number, what, arguments))
            return await future
        finally:
            del self._asked[number]

    def stats(self) -> Stats:
        """The engine's numbers as of its last step; never waits."""
        return self._stats

    @property
    def unread(self) -> int:
        """The most events that any reader lags behind."""
        return self._registry.unread

    def health(self) -> Health:
        """Never waits: reads the shared stamp."""
        age = 0.0 if self._state == "stopped" or not self._children else self._heart.age
        restarts = max(self._children - 1, 0)
        return Health(state=self._state, age=age, restarts=restarts, reason=self._reason)

    async def gave_up(self) -> str:
        """Wait until the engine died too often to be started again; why. The server then exits."""
        return await asyncio.shield(self._gave_up)

    # ── What it hears ───────────────────────────────────────────────────────────────────────────

    def _hear(self, child: Child, message: ToFront) -> None:
        if isinstance(message, Heard):
            self._stats = message.stats
            for slow in self._registry.deliver(message.events):
                self._send(Cancel(slow))
        elif isinstance(message, Answer):
            self._answer(message)
        elif isinstance(message, Ready):
            child.ready = True
            self.info = message.info
            self._set("ready", "")
            if not self._started.done():
                self._started.set_result(None)
        else:
            child.last_words = message

    def _answer(self, message: Answer) -> None:
        future = self._asked.get(message.number)
        if future is None or future.done():
            return
        if message.error is None:
            future.set_result(message.value)
        else:
            future.set_exception(from_code(message.code, message.error))

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    # ── Supervision ─────────────────────────────────────────────────────────────────────────────

    async def _supervise(self) -> None:
        while self._state not in ("stopped", "failed"):
            self._set("loading", "The engine is loading the model.")
            self._children += 1
            try:
                self._child = Child(self._blueprint, self._heart)
            except OSError as error:  # no memory, no files
                words: Dead | None = Dead(f"No process could be started: {error}", EngineDown.code)
            else:
                words = await self._live(self._child)
            if self._state == "stopped":
                return
            self._mourn(words)
            if self._state != "failed":
                recent = sum(time.monotonic() - death < WITHIN for death in self._deaths)
                await asyncio.sleep(BACK_OFF * 2 ** (recent - 1))

    async def _live(self, child: Child) -> Dead | None:
        """Watch over an engine until it is no more; its last words, if it had any."""
        listening = asyncio.create_task(child.listen(self._hear))
        hung = 0.0
        try:
            while not (await asyncio.wait([listening], timeout=WATCH))[0]:
                self._look(child)
                hung = hung + WATCH if self._state == "hung" else 0.0
                if hung > HANGING:
                    child.kill()
        finally:
            listening.cancel()
        self._fail()
        status = await child.end(1.0)
        words = child.last_words
        level = logging.INFO if self._state == "stopped" else logging.ERROR
        if words is not None and not self._started.done():
            level = logging.DEBUG  # the start fails, and says the same
        log.log(
            level,
            "The engine, process %d, ended with status %d.%s",
            *(child.pid, status, f" {words.reason}" if words else ""),
        )
        return words

    def _look(self, child: Child) -> None:
        """Twice stale is hung: the first time, it may have waited for us."""
        self._stale = self._stale + 1 if child.ready and self._heart.stale else 0
        if self._state == "ready" and self._stale > 1:
            age = self._heart.age
            self._set("hung", f"The engine gave no sign of life for {age:.1f} s.")
            log.error(self._reason)
        elif self._state == "hung" and not self._stale:
            self._set("ready", "")

    def _mourn(self, words: Dead | None) -> None:
        """Decide whether there will be another."""
        self._set("down", "The engine died and is being started again.")
        self._stats = Stats()
        self._deaths.append(time.monotonic())
        if words is not None and not self._started.done():
            self._give_up(words.reason, from_code(words.code, words.reason))
        elif len(self._deaths) == DEATHS and time.monotonic() - self._deaths[0] < WITHIN:
            why = f"The engine died {DEATHS} times in {WITHIN:.0f} s."
            why = f"{why} {words.reason}" if words else why
            self._give_up(why, EngineDown(why))

    def _give_up(self, why: str, error: KvistError) -> None:
        self._set("failed", why)
        self._gave_up.set_result(why)
        if not self._started.done():
            self._started.set_exception(error)

    def _fail(self) -> None:
        """Everyone who waits for the engine hears that it is gone."""
        if self._state not in ("stopped", "failed"):
            self._set("down", "The engine died and is being started again.")
        error = EngineDown(self._reason)
        self._registry.fail(error)
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)

    def _set(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason
