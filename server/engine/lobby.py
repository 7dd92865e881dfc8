"""Who waits, in which order, and for how long.

The order is by arrival + priority × aging. All wait equally fast, so it never changes: one sorted
list, O(log n) comparisons to enter and to leave, whoever else is in it.
"""

from bisect import bisect_left, insort

from server.engine.admission import Options
from server.engine.group import Group
from server.errors import DeadlineExceeded, KvistError, QueueFull, QueueTimeout

REMEMBERED = 60.0  # seconds that a cancellation waits for its request …
MOST_REMEMBERED = 4096  # … while there are not more of them


class Lobby:
    def __init__(self, options: Options, most_tokens: int) -> None:
        self._most, self._most_tokens = options.queue, options.queue_tokens or most_tokens
        self._aging = options.aging
        self._waiting: list[tuple[float, int, Group]] = []
        self._timers: list[tuple[float, int, bool, Group]] = []  # when, whose, only while waiting
        self._cancelled: dict[str, float] = {}  # until when it is remembered
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> Group:
        return self._waiting[0][2]

    def check(self, group: Group) -> None:
        """Raise if there is no place for one more."""
        full = len(self) and self._tokens + group.weight > self._most_tokens
        if len(self) >= self._most or full:
            raise QueueFull(
                f"{len(self)} requests of about {self._tokens} tokens wait already, and the queue"
                f" holds {self._most} or {self._most_tokens}: try again later."
            )

    def arrive(self, group: Group, now: float) -> None:
        """Its time begins."""
        request = group.request
        group.arrival = now
        group.key = now + request.priority * self._aging
        for seconds, waiting in ((request.deadline, False), (request.queue_timeout, True)):
            if seconds is not None:
                insort(self._timers, (now + seconds, group.number, waiting, group))
        self.enter(group)

    def enter(self, group: Group) -> None:
        insort(self._waiting, (group.key, group.number, group))
        self._tokens += group.weight

    def leave(self, group: Group) -> None:
        """It begins, or begins again."""
        del self._waiting[bisect_left(self._waiting, (group.key, group.number))]
        self._tokens -= group.weight
        self._stop(group, group.request.queue_timeout, waiting=True)

    def end(self, group: Group, waits: bool) -> None:
        """It is over, and so is its time."""
        if waits:
            self.leave(group)
        self._stop(group, group.request.deadline, waiting=False)

    def _stop(self, group: Group, seconds: float | None, waiting: bool) -> None:
        if seconds is None:
            return
        timer = (group.arrival + seconds, group.number, waiting, group)
        at = bisect_left(self._timers, timer[:3])
        if at < len(self._timers) and self._timers[at] == timer:
            del self._timers[at]

    def late(self, now: float) -> list[tuple[Group, KvistError]]:
        """Whose time is up."""
        found: list[tuple[Group, KvistError]] = []
        while self._timers and self._timers[0][0] <= now:
            _, _, waiting, group = self._timers.pop(0)
            request = group.request
            if waiting:
                why = f"No place was free within {request.queue_timeout} s (queue_timeout)."
                found.append((group, QueueTimeout(why)))
            else:
                why = f"Not finished within {request.deadline} s (deadline)."
                found.append((group, DeadlineExceeded(why)))
        while self._cancelled and next(iter(self._cancelled.values())) <= now:
            del self._cancelled[next(iter(self._cancelled))]
        return found

    def remember(self, id: str, now: float) -> None:
        """A cancellation came before its request."""
        self._cancelled.pop(id, None)
        self._cancelled[id] = now + REMEMBERED
        if len(self._cancelled) > MOST_REMEMBERED:
            del self._cancelled[next(iter(self._cancelled))]

    def was_cancelled(self, id: str) -> bool:
        return self._cancelled.pop(id, None) is not None
