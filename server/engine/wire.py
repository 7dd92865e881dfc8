"""What crosses between the front and the engine: msgpack in frames, checked as it is decoded.

A frame is four bytes of length, little-endian, and one message. Nothing is ever unpickled.
"""

import select
import socket
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from server.engine.request import Event, Request, Stats

Message = TypeVar("Message")
LENGTH = 4


class Blueprint(msgspec.Struct, frozen=True, kw_only=True, tag="build"):
    """What the engine process builds, as plain data: an import path and its arguments."""

    build: str = "server.engine.build:build"  # a function of `options` that returns an Engine
    options: dict[str, Any] = {}


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    id: str


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Call one of the engine's answers between two steps."""

    number: int
    what: str
    arguments: dict[str, Any]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: dict[str, Any]


class Step(msgspec.Struct, frozen=True, tag="step"):
    """All that a step meant, for everybody."""

    events: list[Event]
    stats: Stats


class Heard(msgspec.Struct, frozen=True, tag="step"):
    """The same as the front hears it: an event is read when its reader's turn has come, so that
    the first of many does not wait for all of them."""

    unread: list[msgspec.Raw] = msgspec.field(name="events")
    stats: Stats

    @property
    def events(self) -> Iterator[Event]:
        return map(_event.decode, self.unread)


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    number: int
    value: Any = None
    error: str | None = None
    code: str | None = None


class Dead(msgspec.Struct, frozen=True, tag="dead"):
    """Why it could not be built, or cannot go on."""

    reason: str
    code: str


ToEngine = Blueprint | Submit | Cancel | Ask
FromEngine = Ready | Step | Answer | Dead
ToFront = Ready | Heard | Answer | Dead  # what becomes of it

_encoder = msgspec.msgpack.Encoder()
_event = msgspec.msgpack.Decoder(Event)


def frame(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH, "little") + body


class Frames(Generic[Message]):
    """Messages out of a stream of bytes, wherever it was cut."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[Message]") -> None:
        self._decoder = decoder
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        self._bytes += data
        messages, at = [], 0
        while len(self._bytes) >= at + LENGTH:
            end = at + LENGTH + int.from_bytes(self._bytes[at : at + LENGTH], "little")
            if len(self._bytes) < end:
                break
            messages.append(self._decoder.decode(bytes(self._bytes[at + LENGTH : end])))
            at = end
        del self._bytes[:at]
        return messages


def to_engine() -> Frames[ToEngine]:
    return Frames(msgspec.msgpack.Decoder(ToEngine))


def to_front() -> Frames[ToFront]:
    return Frames(msgspec.msgpack.Decoder(ToFront))


class Line:
    """The engine's end: it reads what is there, and waits only when it has nothing to do."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._frames = to_engine()
        end.setblocking(True)

    def send(self, message: FromEngine) -> None:
        self._socket.sendall(frame(message))

    def receive(self, seconds: float) -> list[ToEngine]:
        """What came; raises EOFError when the front is gone."""
        messages: list[ToEngine] = []
        while not messages and select.select([self._socket], [], [], seconds)[0]:
            data = self._socket.recv(1 << 20)
            if not data:
                raise EOFError("the front is gone")
            messages += self._frames.feed(data)
        return messages
