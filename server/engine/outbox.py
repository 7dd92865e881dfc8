"""The events of a step: one a request, however much happened to it."""

from server.engine.group import Group
from server.engine.request import Choice, Event, Finish
from server.errors import KvistError


class Outbox:
    def __init__(self) -> None:
        self._events: list[Event] = []
        self._groups: list[Group] = []  # whose event is open

    def __len__(self) -> int:
        return len(self._events)

    def take(self) -> list[Event]:
        """Close the events and give them out."""
        for group in self._groups:
            group.event = None
        events, self._events, self._groups = self._events, [], []
        return events

    def event(self, group: Group) -> Event:
        event = group.event
        if event is None:
            event = group.event = Event(id=group.request.id)
            self._events.append(event)
            self._groups.append(group)
            if not group.told:
                self._first(group, event)
        return event

    def _first(self, group: Group, event: Event) -> None:
        group.told = True
        event.prompt_tokens = len(group.prompt)
        event.cached_tokens = group.cached
        event.queued = group.queued
        if group.request.prompt_logprobs is not None:
            event.prompt_logprobs = group.scores

    def choice(self, group: Group, index: int) -> Choice:
        """What this step adds to a branch."""
        choices = self.event(group).choices
        if choices and choices[-1].index == index:
            return choices[-1]
        choice = Choice(index=index)
        choices.append(choice)
        return choice

    def end(self, group: Group, left: list[int], finish: Finish, error: KvistError | None) -> None:
        """The request's last event; the branches `left` never came to an end of their own."""
        for index in left:
            self.choice(group, index).finish = finish
        event = self.event(group)
        event.done = True
        event.beam_rows = group.rows
        if error is not None:
            event.error, event.code = error.message, error.code
