"""The front's book of requests, and what of their output nobody has read yet.

A reader that lags finds everything since in one event, so that a stream costs one event of memory
and as little work as its reader can take. But the tokens in it grow: whoever lags more than `most`
events behind is cut off.
"""

from collections.abc import Callable, Iterable

from server.engine.fold import join
from server.engine.request import Event
from server.errors import Duplicate, KvistError, SlowClient


class Inbox:
    """One request's unread output."""

    __slots__ = ("done", "event", "id", "unread", "wake")

    def __init__(self, id: str) -> None:
        self.id = id
        self.event: Event | None = None
        self.unread = 0  # events that it is made of
        self.done = False  # the last one is among them, or was read
        self.wake: Callable[[], None] | None = None  # whom to call when there is something

    def put(self, event: Event) -> None:
        self.event = event if self.event is None else join(self.event, event)
        self.unread += 1
        self.done = event.done
        if self.wake is not None:
            self.wake()

    def take(self) -> Event | None:
        event, self.event, self.unread = self.event, None, 0
        return event


class Registry:
    def __init__(self, most: int) -> None:
        self._most = most
        self._inboxes: dict[str, Inbox] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._inboxes

    @property
    def unread(self) -> int:
        """The most that anyone lags behind."""
        return max((inbox.unread for inbox in self._inboxes.values()), default=0)

    def open(self, id: str) -> Inbox:
        if id in self._inboxes:
            raise Duplicate(f"A request with the id {id!r} is here already.")
        inbox = self._inboxes[id] = Inbox(id)
        return inbox

    def close(self, inbox: Inbox) -> bool:
        """Nobody reads it any more; whether the engine has to be told."""
        self._inboxes.pop(inbox.id, None)
        return not inbox.done

    def deliver(self, events: Iterable[Event]) -> list[str]:
        """Hand events to their readers; the ids of those who are now cut off."""
        slow = []
        for event in events:
            inbox = self._inboxes.get(event.id)
            if inbox is None or inbox.done:
                continue
            inbox.put(event)
            if inbox.unread > self._most and not inbox.done:
                late = SlowClient(f"{inbox.unread} events were not read; {self._most} may wait.")
                inbox.put(last_words(event.id, late))
                slow.append(event.id)
        return slow

    def fail(self, error: KvistError) -> None:
        """The last event of everyone who still waits for one."""
        for inbox in self._inboxes.values():
            if not inbox.done:
                inbox.put(last_words(inbox.id, error))


def last_words(id: str, error: KvistError) -> Event:
    return Event(id=id, done=True, error=error.message, code=error.code)
