"""Twelve errors that servers like this one have had, planted one at a time.

Each is a patch of production code; a simulation that does not fail under one of them proves little.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from model.batch import Batch
from server.engine import group as group_module
from server.engine.group import Branch, Group
from server.engine.holdings import Copy, Holdings
from server.engine.lobby import Lobby
from server.engine.pages import Pages, link, root
from server.engine.reader import Reader
from server.engine.scheduler import Scheduler
from server.errors import KvistError

Mutant = Callable[[], AbstractContextManager[Any]]


def skip_one_decref() -> AbstractContextManager[Any]:
    """Every seventh list of pages is dropped without its first."""
    plain, calls = Pages.drop, iter(range(10**9))

    def drop(self: Pages, pages: Iterable[int]) -> None:
        kept = list(pages)
        plain(self, kept[1:] if next(calls) % 7 == 6 else kept)

    return patch.object(Pages, "drop", drop)


def free_twice() -> AbstractContextManager[Any]:
    plain, calls = Pages._settle, iter(range(10**9))

    def settle(self: Pages, page: int) -> None:
        plain(self, page)
        if self._digest[page] is None and next(calls) % 7 == 6:
            self._free.append(page)

    return patch.object(Pages, "_settle", settle)


def publish_before_write() -> AbstractContextManager[Any]:
    """As soon as the row is scheduled."""
    plain = Scheduler.schedule

    def schedule(self: Scheduler) -> Batch | None:
        batch = plain(self)
        if batch is not None:
            for branch, end in self._flying[-1].rows:
                if end <= len(branch.group.prompt):
                    self._holdings.publish(branch, end)
        return batch

    return patch.object(Scheduler, "schedule", schedule)


def no_copy_on_write() -> AbstractContextManager[Any]:
    return patch.object(Pages, "own", lambda self, page, readers=1: True)


def forget_beam_fork() -> AbstractContextManager[Any]:
    """A beam's second child does not count as a reader."""
    plain = Holdings.regrow

    def regrow(self: Holdings, group: Group, parents: list[int], tokens: list[int]) -> None:
        share, seen = self.pages.share, set[int]()

        def once(pages: list[int]) -> None:
            if pages and pages[-1] not in seen:
                seen.add(pages[-1])
                share(pages)

        with patch.object(self.pages, "share", once):
            plain(self, group, parents, tokens)

    return patch.object(Holdings, "regrow", regrow)


def last_come_first_served() -> AbstractContextManager[Any]:
    return patch.object(Lobby, "first", property(lambda self: self._waiting[-1][2]))


def lose_cancel_in_waiting() -> AbstractContextManager[Any]:
    plain = Scheduler.cancel

    def cancel(self: Scheduler, id: str, reason: KvistError | None = None) -> None:
        if id not in self._groups or self._groups[id] in self.running:
            plain(self, id, reason)

    return patch.object(Scheduler, "cancel", cancel)


@contextmanager
def emit_after_finish() -> Iterator[None]:
    """The row that a late stop has wasted is read all the same."""
    plain = Reader.samples

    def samples(self: Reader) -> list[Branch]:
        late = [(b, b.finish) for b, _, _ in self._step.samples if b.finish and not b.group.over]
        for branch, _ in late:
            branch.finish = None
        ended = plain(self)
        for branch, finish in late:
            branch.finish = finish
        return [branch for branch in ended if branch not in [late for late, _ in late]]

    with patch.object(Reader, "samples", samples):
        yield


def off_by_one_last_page() -> AbstractContextManager[Any]:
    """A page is taken one token too late."""
    plain = Holdings.extend

    def extend(self: Holdings, branch: Branch, end: int) -> list[Copy]:
        return plain(self, branch, end - 1 if end % self.pages.size == 1 else end)

    return patch.object(Holdings, "extend", extend)


def hash_without_parent() -> AbstractContextManager[Any]:
    return patch.object(group_module, "link", lambda parent, tokens: link(b"", tokens))


def hash_without_salt() -> AbstractContextManager[Any]:
    return patch.object(group_module, "root", lambda salt: root(""))


def gauge_not_lowered() -> AbstractContextManager[Any]:
    plain = Lobby.leave

    def leave(self: Lobby, group: Group) -> None:
        before = self._tokens
        plain(self, group)
        self._tokens = before

    return patch.object(Lobby, "leave", leave)


MUTANTS: list[Mutant] = [
    skip_one_decref,
    free_twice,
    publish_before_write,
    no_copy_on_write,
    forget_beam_fork,
    last_come_first_served,
    lose_cancel_in_waiting,
    emit_after_finish,
    off_by_one_last_page,
    hash_without_parent,
    hash_without_salt,
    gauge_not_lowered,
]
