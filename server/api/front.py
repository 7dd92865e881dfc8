"""What the routes share: the engine's client, the model's words, the keys, and whether to serve."""

import asyncio
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from server.api.fields import Bounds, parse
from server.api.keys import Keys
from server.api.schema import NOT_SERVED, Strict
from server.api.served import Served
from server.api.turns import Turns
from server.api.work import Pool
from server.config import Settings
from server.engine.process import Health
from server.engine.registry import Inbox
from server.engine.request import Request, Stats
from server.errors import Draining, EngineDown
from server.metrics import Metrics
from server.traces import Traces

Body = TypeVar("Body", bound=Strict)


class Engine(Protocol):
    """What server.engine.process.Client does."""

    def open(self, request: Request) -> AbstractContextManager[Inbox]: ...
    def cancel(self, id: str) -> None: ...
    def stats(self) -> Stats: ...
    def health(self) -> Health: ...
    async def ask(self, what: str, **arguments: Any) -> Any: ...


@dataclass
class Front:
    settings: Settings
    engine: Engine
    metrics: Metrics
    keys: Keys
    traces: Traces | None = None
    pool: Pool = field(default_factory=Pool)
    coming: Turns = field(default_factory=Turns)  # of those who ask …
    going: Turns = field(default_factory=Turns)  # … and of those whose answer begins, or ends
    served: Served | None = None  # from the moment that the engine is ready
    draining: bool = False  # not ready any more …
    closed: bool = False  # … and nothing new is taken
    began: float = field(default_factory=time.monotonic)
    running: set["asyncio.Task[Any]"] = field(default_factory=set)  # answers under way

    def open(self) -> Served:
        """What is served; raises when nothing can be at the moment."""
        if self.closed:
            raise Draining("The server is stopping; ask again elsewhere or later.")
        health = self.engine.health()
        if self.served is None or not health.ready:
            why = (health.reason or health.state).rstrip(".")
            raise EngineDown(f"The model cannot be asked now: {why}.")
        return self.served

    def parse(
        self, served: Served, kind: type[Body], raw: dict[str, Any]
    ) -> tuple[Body, list[str]]:
        """The checked body of a route, and what to warn of."""
        bounds = Bounds(served.limits, served.vocabulary)
        return parse(kind, raw, bounds, NOT_SERVED.get(kind, {}), self.settings.lenient)

    @property
    def ready(self) -> bool:
        return not self.draining and self.served is not None and self.engine.health().ready
