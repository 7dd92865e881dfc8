"""The groups that run, in the order of their turns: who may come in, and what begins and ends then.

At most one suspect of having made a step fail is among them. Pinned groups come in only beside
pinned ones that fit together even at their worst: they never give way to anybody.
"""

from bisect import insort
from collections.abc import Iterator

from model.batch import Seat
from server.engine.group import Branch, Group
from server.engine.holdings import Holdings
from server.engine.rows import Rows


class Running:
    def __init__(self, holdings: Holdings) -> None:
        self.suspect: Group | None = None
        self.pinned = 0  # footprints of the pinned ones
        self._holdings, self._pages = holdings, holdings.pages
        self._groups: list[Group] = []  # pinned ones first, then by age
        self._taken: list[Seat] = []  # since the last step …
        self._begun: list[Group] = []  # … by these

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @property
    def newest(self) -> Group:
        """Who gives way first."""
        return self._groups[-1]

    def admits(self, group: Group) -> bool:
        """Whether there are a place and pages for one more."""
        if group.width > len(self._holdings.vacant) or (group.suspect and self.suspect):
            return False
        if group.pinned and self.pinned + group.footprint > self._pages.count:
            return False
        return not self._groups or self._cost(group) <= self._pages.available

    def _cost(self, group: Group) -> int:
        """Pages for all that it has to compute, and one more for everybody who runs then."""
        size, stem = self._pages.size, group.branches[0]
        need = sum(-(-b.length // size) - b.fork_at // size for b in group.living)
        if group.request.prompt_logprobs is None and self._pages.caching:
            need -= self._pages.shared(stem.digests((stem.length - 1) // size, size))
        return need + self._holdings.taken + group.width

    def begin(self, group: Group) -> None:
        insort(self._groups, group, key=_rank)
        self._begun.append(group)
        if group.pinned:
            self.pinned += group.footprint
        if group.suspect:
            self.suspect = group
        group.seats = [self._holdings.vacant.pop() for _ in range(group.width)]
        for branch in group.living:
            branch.seat = group.seats.pop()
            self._taken.append(_seat(branch))

    def leave(self, group: Group) -> None:
        """Its pages and seats are for others."""
        self._groups.remove(group)
        if group.pinned:
            self.pinned -= group.footprint
        if self.suspect is group:
            self.suspect = None
        if group in self._begun:  # and left before it was in a step
            self._begun.remove(group)
            seats = {branch.seat for branch in group.living}
            self._taken = [seat for seat in self._taken if seat.seat not in seats]
        self._holdings.release(group.living)
        self._holdings.vacant += group.seats
        group.seats, group.forks = [], []

    def launch(self, rows: Rows) -> None:
        """These rows are the next step: in it, those who began since the last take their seats."""
        rows.taken, self._taken = self._taken, []
        rows.step.begun, self._begun = self._begun, []

    def trust(self) -> None:
        """Something good came of the suspect, if it was heard of."""
        if self.suspect is not None and self.suspect.event is not None:
            self.suspect.suspect = False
            self.suspect = None


def _rank(group: Group) -> tuple[bool, float, int]:
    return not group.pinned, group.key, group.number


def _seat(branch: Branch) -> Seat:
    group, sampling = branch.group, branch.group.request.sampling
    back = sampling.looks_back
    prompt, output = (group.prompt.tolist(), list(branch.output)) if back else ([], [])
    return Seat(branch.seat, sampling, branch.index, prompt, output, len(group.prompt))
