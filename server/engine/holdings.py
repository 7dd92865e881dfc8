"""What the branches that run hold: a seat each, and pages in order.

A row may write only pages that nobody else reads and nobody can find. So a branch that shares its
last, half-filled page copies it before it goes on; the last one to do so keeps the original.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from model.batch import Ints
from server.engine.group import Branch, Group
from server.engine.pages import Pages

Copy = tuple[int, int, int]  # from page, to page, slots


class Table:
    """Every seat's pages in order, kept up to date page by page instead of being rebuilt."""

    def __init__(self, seats: int) -> None:
        self._pages = np.zeros((seats, 64), np.int32)

    def put(self, seat: int, at: int, pages: list[int]) -> None:
        end = at + len(pages)
        if end > self._pages.shape[1]:
            more = np.zeros((len(self._pages), 2 * end - self._pages.shape[1]), np.int32)
            self._pages = np.concatenate([self._pages, more], axis=1)
        self._pages[seat, at:end] = pages

    def clear(self, seat: int) -> None:
        self._pages[seat] = 0

    def of(self, seats: Ints, widest: int) -> Ints:
        return self._pages[seats, :widest]


class Holdings:
    def __init__(self, pages: Pages, seats: int) -> None:
        self.pages, self.table = pages, Table(seats)
        self.seats = seats
        self.vacant = list(range(seats - 1, -1, -1))

    @property
    def taken(self) -> int:
        """Seats that somebody has."""
        return self.seats - len(self.vacant)

    def release(self, branches: Iterable[Branch]) -> None:
        """Pages and seats are for others."""
        for branch in branches:
            self.pages.drop(reversed(branch.pages))
            self.table.clear(branch.seat)
            self.vacant.append(branch.seat)
            branch.pages, branch.seat = [], -1

    def need(self, branches: list[Branch], count: int) -> int:
        """How many pages it takes until all of these own those of their next `count` tokens."""
        need, shared = 0, Counter[int]()
        for branch in branches:
            at, slots = divmod(branch.computed, self.pages.size)
            need += max(at - (-(slots + count) // self.pages.size) - len(branch.pages), 0)
            if slots and not self.pages.own(branch.pages[at]):
                shared[branch.pages[at]] += 1
        return need + sum(n - self.pages.own(page, readers=n) for page, n in shared.items())

    def extend(self, branch: Branch, end: int) -> list[Copy]:
        """Own pages up to position `end`, of which there are enough; what is to be copied."""
        pages, size = self.pages, self.pages.size
        at, slots = divmod(branch.computed, size)
        copies: list[Copy] = []
        if slots and not pages.own(branch.pages[at]):
            shared, branch.pages[at] = branch.pages[at], pages.take()
            copies.append((shared, branch.pages[at], slots))
            pages.drop([shared])
            self.table.put(branch.seat, at, branch.pages[at : at + 1])
        while len(branch.pages) * size < end:
            branch.pages.append(pages.take())
            self.table.put(branch.seat, len(branch.pages) - 1, branch.pages[-1:])
        return copies

    def room(self, branch: Branch) -> int:
        """How many tokens there are pages for."""
        at, slots = divmod(branch.computed, self.pages.size)
        copy = bool(slots) and not self.pages.own(branch.pages[at])
        most = len(branch.pages) + self.pages.available - copy
        return max(most * self.pages.size - branch.computed, 0)

    def find(self, branch: Branch) -> int:
        """Read what others have computed, wherever a page begins; how many tokens that saves.

        At least one token is left to compute, because only that gives something to sample from.
        Pages hold no log-probabilities: a prompt that wants them is computed again.
        """
        size, group, first = self.pages.size, branch.group, len(branch.pages)
        most = (branch.length - 1) // size
        if group.request.prompt_logprobs is not None:
            most = min(most, group.scored // size)
        if branch.computed != first * size or most <= first or not self.pages.caching:
            return 0
        found = self.pages.match(branch.digests(most, size)[first:most])
        branch.pages += found
        branch.published = len(branch.pages)
        branch.computed = branch.published * size
        self.table.put(branch.seat, first, found)
        return len(found) * size

    def publish(self, branch: Branch, end: int) -> None:
        """Let others find the pages that an ended step has filled."""
        size = self.pages.size
        full = min(end, branch.computed) // size
        if full > branch.published and branch.pages and self.pages.caching:
            chain = branch.digests(full, size)
            for at in range(branch.published, full):
                self.pages.publish(branch.pages[at], chain[at])
            branch.published = full

    def sprout(self, group: Group) -> bool:
        """Let buds whose source is far enough read its pages; whether there were any.

        Only ever before the group has rows in a step: a step's copies come before its writes, so
        what is shared must be there already.
        """
        size, buds = self.pages.size, group.buds
        group.buds = []
        for bud in buds:
            source = bud.source
            if source is None or source.computed < bud.fork_at:
                group.buds.append(bud)
                continue
            full = bud.fork_at // size
            bud.pages = source.pages[: -(-bud.fork_at // size)]
            bud.chain = bud.chain if len(bud.chain) > full else source.chain[:full]
            bud.computed, bud.published = bud.fork_at, min(source.published, full)
            bud.source = None
            self.pages.share(bud.pages)
            self.table.put(bud.seat, 0, bud.pages)
            group.branches.append(bud)
        if not group.buds:
            group.branches.sort(key=lambda branch: branch.index)
        return len(group.buds) < len(buds)

    def regrow(self, group: Group, parents: list[int], tokens: list[int]) -> None:
        """The beams of the next step: each reads its parent's pages, and writes its own."""
        old = group.branches
        pairs = enumerate(zip(parents, tokens, strict=True))
        group.branches = [_child(old[row], rank, token) for rank, (row, token) in pairs]
        for child in group.branches:
            self.pages.share(child.pages)
        for parent in old:
            self.pages.drop(reversed(parent.pages))
        self._reseat(group, old, parents)

    def _reseat(self, group: Group, old: list[Branch], parents: list[int]) -> None:
        """A parent's first child stays on its seat; the others take a copy of what is there."""
        heirs = dict(zip(reversed(parents), reversed(group.branches), strict=True))
        for row, parent in enumerate(old):
            if row in heirs:
                heirs[row].seat = parent.seat
            else:
                group.seats.append(parent.seat)
        for row, child in zip(parents, group.branches, strict=True):
            if child.seat < 0:
                child.seat = group.seats.pop()
                group.forks.append((old[row].seat, child.seat))
                self.table.put(child.seat, 0, child.pages)

    def check(self, groups: list[Group]) -> None:
        """Raise unless pages and seats agree with the groups that run."""
        branches = [branch for group in groups for branch in group.living]
        self.pages.check(branch.pages for branch in branches)
        seats = self.vacant + [seat for group in groups for seat in group.seats]
        if sorted(seats + [branch.seat for branch in branches]) != list(range(self.seats)):
            raise RuntimeError("A seat is lost, or taken twice.")


def _child(parent: Branch, rank: int, token: int) -> Branch:
    child = Branch(
        group=parent.group,
        index=rank,
        text=parent.text.fork(),
        length=parent.length + 1,
        computed=parent.computed,
        output=[*parent.output, token],
        pages=list(parent.pages),
        published=parent.published,
        chain=list(parent.chain),
        mask=parent.mask and parent.mask.fork(),
    )
    if child.mask is not None:
        child.mask.push(token)
    if parent.group.request.stop:
        child.text.push(token)
    return child
