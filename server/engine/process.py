"""The engine in a process of its own, and the client that the API awaits.

One AF_UNIX socket pair joins the two; messages are msgpack, checked against their schema; all
events of a step cross in one. A stamp in shared memory tells that the engine is alive. When it
dies or hangs, each request it had ends with one error event and a new engine is started.
"""

from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

from server.engine.request import Event, Request, Stats

State = Literal["loading", "ready", "hung", "down", "failed", "stopped"]


class Blueprint(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process builds, as plain data: an import path and its arguments."""

    build: str = "server.engine.engine:build"  # a function of `options` that returns an Engine
    options: dict[str, Any] = {}


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What the heartbeat says. Serving is possible in `ready` only."""

    state: State
    age: float  # seconds since the engine's last sign of life
    restarts: int  # engines started after the first
    reason: str = ""  # why it is not ready, a sentence

    @property
    def ready(self) -> bool:
        return self.state == "ready"


class Client:
    """The engine process as seen from the event loop that started it."""

    info: dict[str, Any]  # what the engine says of itself once ready: model, device, pages, …

    def __init__(self, blueprint: Blueprint, *, unread: int = 256) -> None:
        """`unread`: how many events a consumer may lag behind before its request is aborted."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start the engine and wait until it is ready; raises EngineDown with its last words."""

    async def stop(self, timeout: float = 5.0) -> None:
        """End the engine; what still runs gets an error event. Never raises, may be repeated."""

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """The request's events, the last with `done`. Leaving the loop early (`aclosing`) cancels.

        A request that is refused or fails ends with one event whose `error` and `code` are set;
        `errors.from_code` makes the exception of it. A consumer that lags gets deltas joined
        together; one that lags more than `unread` events is aborted with code `slow_client`.
        """
        raise NotImplementedError

    def cancel(self, id: str) -> None:
        """End the request in whatever state; its stream gets a last event with `cancelled`."""

    def stats(self) -> Stats:
        """The engine's numbers as of its last step; never waits."""
        raise NotImplementedError

    def health(self) -> Health:
        """Never waits: reads the shared stamp."""
        raise NotImplementedError

    async def ask(self, what: str, **arguments: Any) -> Any:
        """Call one of the engine's `answers` between two steps (embeddings, explanations)."""

    async def gave_up(self) -> str:
        """Wait until the engine died too often to be restarted; returns why. The server exits."""
        raise NotImplementedError
