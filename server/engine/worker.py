"""The engine's side of its process: `python -m server.engine.worker SOCKET HEART`, two open files.

It reads requests, steps, and sends what each step meant in one message. When the front is gone,
it goes too: one thread only waits for that, so that not even a step that hangs outlives the front.
"""

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from importlib import import_module
from typing import cast

import msgspec

from server.engine.engine import Engine
from server.engine.heart import UNSEEN, Heart, Pace
from server.engine.registry import last_words
from server.engine.request import Event, Request
from server.engine.wire import (
    Answer,
    Ask,
    Blueprint,
    Cancel,
    Dead,
    Line,
    Ready,
    Step,
    Submit,
    ToEngine,
)
from server.errors import Failed, KvistError
from server.settle import settle

log = logging.getLogger(__name__)

IDLE = 0.5  # seconds between beats when there is nothing to do
LOADING = 3600.0  # a large model from a slow disk


def main(socket_fd: int, heart_fd: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the front tells it when to go
        signal.signal(number, signal.SIG_IGN)
    end = socket.socket(fileno=socket_fd)
    threading.Thread(target=_die_with, args=(socket_fd,), daemon=True).start()
    line, heart = Line(end), Heart(heart_fd)
    heart.beat(LOADING)
    (blueprint,) = line.receive(LOADING)
    assert isinstance(blueprint, Blueprint)
    try:
        engine = _build(blueprint)
    except Exception as error:
        if not isinstance(error, KvistError):  # whose sentence says it all
            log.exception("The engine could not be built")
        line.send(_last_words(error))
        return 1
    settle()
    line.send(Ready(engine.info))
    Worker(engine, line, heart).run()
    return 0


def _die_with(fd: int) -> None:
    """End this process when the other end of the socket is closed, whatever else it does."""
    poll = select.poll()
    poll.register(fd, 0)  # hang-ups are always reported
    poll.poll()
    time.sleep(IDLE)  # the worker may have read it too, and ends more gently
    os._exit(0)


def _build(blueprint: Blueprint) -> Engine:
    module, _, name = blueprint.build.partition(":")
    return cast(Engine, getattr(import_module(module), name)(**blueprint.options))


def _last_words(error: Exception) -> Dead:
    if isinstance(error, KvistError):
        return Dead(error.message, error.code)
    return Dead(f"The engine could not be built: {type(error).__name__}: {error}", "engine_down")


class Worker:
    """Everything between two messages."""

    def __init__(self, engine: Engine, line: Line, heart: Heart) -> None:
        self._engine, self._line, self._heart = engine, line, heart
        self._pace = Pace()
        self._refused: list[Event] = []
        engine.pulse = self._expect
        self._expected = 0  # tokens of the step that is waited for

    def run(self) -> None:
        """Until the front is gone."""
        try:
            while True:
                for message in self._line.receive(IDLE if self._engine.idle else 0):
                    self._hear(message)
                self._step()
        except (EOFError, ConnectionError):
            return

    def _hear(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self._submit(message.request)
        elif isinstance(message, Cancel):
            self._engine.cancel(message.id)
        elif isinstance(message, Ask):
            self._line.send(self._answer(message))

    def _step(self) -> None:
        self._expected, began = 0, time.monotonic()
        self._heart.beat()
        events = self._engine.step()
        if self._expected:
            self._pace.saw(self._expected, time.monotonic() - began)
        self._heart.beat()
        if self._refused or events:
            events, self._refused = self._refused + events, []
            self._line.send(Step(events, self._engine.stats))
            os.sched_yield()  # where both share a core, the front read it 0.4 ms later

    def _expect(self, tokens: int) -> None:
        self._expected = max(tokens, self._expected)
        self._heart.beat(self._pace.patience(self._expected))

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except KvistError as error:
            self._refused.append(last_words(request.id, error))
        except Exception:
            log.exception("A request could not be submitted")
            self._refused.append(last_words(request.id, Failed("The request could not be begun.")))

    def _answer(self, ask: Ask) -> Answer:
        answer = self._engine.answers.get(ask.what)
        if answer is None:
            return Answer(ask.number, error=f"Nobody answers {ask.what!r} here.", code="not_found")
        self._heart.beat(UNSEEN)
        try:
            return Answer(ask.number, msgspec.to_builtins(answer(**ask.arguments)))
        except KvistError as error:
            return Answer(ask.number, error=error.message, code=error.code)
        except Exception:
            log.exception("%s failed", ask.what)
            return Answer(ask.number, error=f"{ask.what} failed.", code=Failed.code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
