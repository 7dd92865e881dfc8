"""Schedule, run, advance: nothing else touches the executor."""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from model.batch import Batch, Executor, Output
from server.engine.admission import Options
from server.engine.masks import Making, boundless
from server.engine.pages import Pages
from server.engine.request import Event, Request, Stats
from server.engine.scheduler import Scheduler, wordless
from server.engine.text import Text
from server.errors import KvistError, OutOfMemory, StepFailed

log = logging.getLogger(__name__)

FATAL = ("CUDA error", "NCCL error")  # a device that says so says it for ever
NO_MEMORY = ("out of memory", "t allocate memory")  # torch, of a GPU and of a CPU
FAILURES = 64  # steps in a row that may raise; more are nobody's request's doing


class Engine:
    """Requests in, events out, a step at a time."""

    def __init__(
        self,
        executor: Executor,
        pages: Pages,
        options: Options | None = None,
        *,
        text: Callable[[Request], Text] = wordless,
        name: Callable[[int], str] = str,
        clock: Callable[[], float] = time.monotonic,
        mask: Making = boundless,
        info: dict[str, Any] | None = None,
        answers: dict[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.options = options or Options()
        self.scheduler = Scheduler(pages, self.options, text, name, clock, mask)
        self.info = info or {}  # what it says of itself
        self.answers = answers or {}  # what can be asked between two steps
        self._executor = executor
        self._flying: deque[tuple[int, Callable[[], Output]]] = deque()  # tokens, and the wait
        self._failures = 0  # steps that raised since the last that did not
        self._broken = False  # the newest step in flight could not even be launched
        self.pulse: Callable[[int], None] = _nothing  # told of the tokens that are waited for

    def submit(self, request: Request) -> None:
        """Queue it; raises Refused or Busy."""
        self.scheduler.submit(request)

    def cancel(self, id: str, reason: KvistError | None = None) -> None:
        self.scheduler.cancel(id, reason)

    def step(self) -> list[Event]:
        """One step further. An exception in it fails, or tries again, who was in it; no other.
        What raises from here is not a request's doing: this engine is to be thrown away."""
        while len(self._flying) <= self.options.ahead and not self._broken:
            batch = self.scheduler.schedule()
            if batch is None:
                break
            tokens = len(batch.tokens)
            self.pulse(max([tokens, *(before for before, _ in self._flying)]))
            self._flying.append((tokens, self._launch(batch)))
        if not self._flying:
            return self.scheduler.events()
        try:
            output = self._flying.popleft()[1]()
        except Exception as error:
            self._failures += 1
            if self._failures > FAILURES or any(word in str(error) for word in FATAL):
                raise  # this process is beyond help; its supervisor starts another
            log.exception("A step failed")
            return self._give_up(error)
        self._failures = 0
        return self.scheduler.advance(output)

    def _launch(self, batch: Batch) -> Callable[[], Output]:
        try:
            return self._executor.launch(batch)
        except Exception as error:
            self._broken = True
            return _raiser(error)

    def _give_up(self, error: Exception) -> list[Event]:
        """What was launched after a failed step computed on what that one left behind."""
        for _, wait in self._flying:
            try:
                wait()
            except Exception:
                log.exception("A step failed after another")
        self._flying.clear()
        self._broken = False
        return self.scheduler.failed(_blame(error))

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def stats(self) -> Stats:
        return self.scheduler.stats


def _blame(error: Exception) -> KvistError:
    """What a request is told that makes steps raise."""
    if isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY):
        return OutOfMemory(
            "A step with this request takes more memory than there is: ask for less."
        )
    return StepFailed(f"A step raised twice: {type(error).__name__}.")


def _nothing(tokens: int) -> None: ...


def _raiser(error: Exception) -> Callable[[], Output]:
    def wait() -> Output:
        raise error

    return wait
