"""Who computes what in the next step, and what the last one meant.

One rule for all rows: a branch has tokens still to compute. Decode is the case of one; chunks of
prompts, branches that share a prompt, beams, drafts to verify, and computing again differ in
numbers only, and share steps. A step is filled in this order until its token budget is spent:

    decodes   branches that lack one token, oldest first. When there is no page left, the newest
              group gives up all of its own and waits to be computed again. After the third time
              it is pinned: it never gives way again, and comes in only beside pinned groups that
              fit even at their worst. So everybody ends.
    chunks    prompts, oldest first. They wait for pages, and take none away.
    waiting   first come first served within a priority; the first one blocks those behind it.

`schedule` may be called again before `advance` (one step ahead), unless what comes next depends
on what the step in flight will find: beams, drafts, masks, no page left. What then turns out to
have ended has cost one row, whose sample nobody reads; its pages are free when that step is over.
"""

import time
from collections import deque
from collections.abc import Callable

from model.batch import Batch, Output
from server.engine import admission, masks
from server.engine.admission import Options
from server.engine.beam_group import BeamGroup
from server.engine.drafts import Lookup
from server.engine.group import Branch, Group
from server.engine.holdings import Holdings
from server.engine.lobby import Lobby
from server.engine.outbox import Outbox
from server.engine.pages import Pages
from server.engine.reader import Reader
from server.engine.request import Event, Finish, Request, Stats
from server.engine.rows import Rows, Step
from server.engine.running import Running
from server.engine.text import Silent, Text
from server.errors import Duplicate, KvistError, NumericalError

ANY = 2**31 - 1  # ids, if nobody says how many there are
BAD = (
    "The model's output is not a number, or what it may say leaves no token: look at bad_words,"
    " allowed_token_ids and logit_bias."
)


def wordless(request: Request) -> Text:
    """The text of an engine that has no tokenizer."""
    return Text(Silent(), request.stop, request.include_stop)


class Scheduler:
    def __init__(
        self,
        pages: Pages,
        options: Options,
        text: Callable[[Request], Text] = wordless,
        name: Callable[[int], str] = str,  # of a token, for those who watch beams
        clock: Callable[[], float] = time.monotonic,
        mask: masks.Making = masks.boundless,
    ) -> None:
        self.pages, self.options = pages, options
        self._text, self._name, self._clock, self._mask = text, name, clock, mask
        self._lobby = Lobby(options, 4 * pages.count * pages.size)
        self._groups: dict[str, Group] = {}  # running or waiting
        self._flying: deque[Step] = deque()
        self._holdings = Holdings(pages, options.seats)
        self.running = Running(self._holdings)
        self._short = False  # a branch lacks pages: let nobody in, launch nothing ahead
        self._moved = False  # somebody found what it needs without a row: look again
        self._number = 0
        self._outbox = Outbox()
        sizes = [0] * ((options.budget - 1).bit_length() + 1)
        self._stats = Stats(pages=pages.count, page_size=pages.size, step_sizes=sizes)

    # ── The door ────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request) -> None:
        """Let it wait for its turn; raises Refused or Busy."""
        try:
            if request.id in self._groups:
                raise Duplicate(f"A request with the id {request.id!r} is here already.")
            beams = self.check_request(request)
            group = self._group(request, beams)
            self._lobby.check(group)
        except KvistError as error:
            _count(self._stats.rejected, error.code)
            raise
        self._groups[request.id] = group
        self._lobby.arrive(group, self._clock())
        self._stats.prompt_tokens += len(group.prompt)
        if self._lobby.was_cancelled(request.id):
            self.cancel(request.id)
        elif group.needs_nothing:
            self._end_unsampled(group)

    def check_request(self, request: Request) -> BeamGroup | None:
        """Raise Refused for what could not be served even if nobody else were here."""
        admission.check(request, self.options, self.pages.count, self.pages.size)
        vocabulary = self.options.vocabulary or ANY
        return BeamGroup(request, vocabulary, self._name) if request.beams else None

    def _group(self, request: Request, beams: BeamGroup | None) -> Group:
        self._number += 1
        mask = masks.begin(request, self._mask, self.options.vocabulary)
        group = Group(request, self._number, self._text(request), mask, beams=beams)
        group.footprint = admission.footprint(request, self.pages.size)
        if beams is None and not request.sampling.looks_back:
            group.draft = self.options.draft if request.draft is None else request.draft
        count = 1 if beams or not request.max_tokens else request.n
        group.plant([group.branch(index) for index in range(count)])
        return group

    def cancel(self, id: str, reason: KvistError | None = None) -> None:
        """End it in whatever state it is; one that is not here yet, when it comes."""
        group = self._groups.get(id)
        if group is None:
            self._lobby.remember(id, self._clock())
        else:
            self._end(group, "cancelled", reason)

    def _end(self, group: Group, finish: Finish, error: KvistError | None = None) -> None:
        """Give back everything that it holds, and say so; only the first time counts."""
        if group.over:
            return
        group.over = True
        runs = group in self.running
        cut = finish in ("cancelled", "error")
        if cut:
            place = "decode" if group.told else "prefill" if group.started else "queue"
            _count(self._stats.aborted, place)
        _count(self._stats.finished, finish)
        self._outbox.end(group, group.unfinished if cut else [], finish, error)
        self._lobby.end(group, waits=not runs)
        if runs:
            self.running.leave(group)
        group.branches, group.buds = [], []  # no cycle is left for the garbage collector
        del self._groups[group.request.id]

    # ── A step ──────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Batch | None:
        """The next step; None when there is nothing to do before the step in flight is read."""
        self._expire()
        if self._flying and (self._short or self._flying[-1].alone):
            return None
        rows = self._fill()
        while not rows and self.running and not self._flying:
            if not self._moved:
                self._preempt()
            rows = self._fill()
        if not rows:
            return None
        self.running.launch(rows)
        self._flying.append(rows.step)
        self.pages.launched()
        self._count_step(self.options.budget - rows.left)
        return rows.batch()

    def _count_step(self, tokens: int) -> None:
        stats = self._stats
        stats.steps += 1
        stats.step_tokens += tokens
        stats.step_sizes[(tokens - 1).bit_length()] += 1

    def _expire(self) -> None:
        for group, error in self._lobby.late(self._clock()):
            self._end(group, "error", error)

    def _fill(self) -> Rows:
        self._short = self._moved = False
        rows = Rows(self._holdings.table, self.options.budget)
        behind = [branch for branch in self._decode(rows) if branch.seat >= 0]  # not preempted
        for branch in behind:
            self._compute(branch, rows, crowded=len(behind) > 1 or len(self._lobby) > 0)
        while rows.left > 0 and not self._short and self._lobby:
            group = self._lobby.first
            if not self.running.admits(group):
                break  # who waits behind it waits longer
            self._begin(group)
            self._compute(group.branches[0], rows, crowded=len(self._lobby) > 0)
        return rows

    def _decode(self, rows: Rows) -> list[Branch]:
        """Rows for all who lack one token; the branches that lack more."""
        behind: list[Branch] = []
        spare = rows.left - self._holdings.taken  # tokens for guesses
        for group in self.running:
            if group.buds and self._holdings.sprout(group):
                self._moved = True
            last = group.last
            ready = [b for b in group.branches if min(b.length, last) - b.computed == 1]
            if len(ready) < len(group.branches):
                behind += [b for b in group.branches if b.todo > 1]
            if group.beams is not None and not len(group.living) == len(ready) <= rows.left:
                continue  # the last tokens of beams are computed in one step
            ready = ready[: rows.left]
            if not ready or not self._own(ready, 1, rows):
                continue
            for branch in ready:
                guess = self._guess(branch, spare) if group.draft and spare > 0 else []
                spare -= len(guess)
                rows.add(branch, 1, guess)
        return behind

    def _compute(self, branch: Branch, rows: Rows, crowded: bool) -> None:
        """A chunk of what a branch lacks, as far as there are pages."""
        group = branch.group
        most = self.options.chunk if crowded and self.options.chunk else rows.left
        kept = group.beams is not None and len(group.living) > 1
        found, room = self._holdings.find(branch), self._holdings.room(branch)
        self._moved = self._moved or found > 0
        self._short = self._short or not room
        if not group.again:
            group.cached += found
            self._stats.cache_hits += found
        count = min(branch.todo - kept, rows.left, most, room)
        if count > 0 and self._own([branch], count, rows):
            rows.add(branch, count, [])

    def _own(self, branches: list[Branch], count: int, rows: Rows) -> bool:
        """Have pages that the next `count` tokens may be written to; False: not in this step."""
        most = len(branches) * (2 + count // self.pages.size)
        while most > self.pages.available < self._holdings.need(branches, count):
            if self._flying:
                self._short = True
                return False
            if self._preempt() is branches[0].group:
                return False
        for branch in branches:
            rows.copies += self._holdings.extend(branch, branch.computed + count)
        return True

    def _guess(self, branch: Branch, most: int) -> list[int]:
        """What may come next, within the pages that nobody else will miss."""
        pages, group = self.pages, branch.group
        if branch.lookup is None:
            branch.lookup = Lookup(group.prompt.tolist() + branch.output)
        room = len(branch.pages) * pages.size - branch.computed
        if pages.available > self._holdings.taken:
            room += pages.size
        most = min(most, branch.guesses, room - 1, group.last - branch.computed - 1)
        guess = branch.lookup.guess(most) if most > 0 else []
        if guess:
            self._holdings.extend(branch, branch.computed + 1 + len(guess))
        return guess

    # ── Who runs ────────────────────────────────────────────────────────────────────────────────

    def _begin(self, group: Group) -> None:
        self._moved = True
        self._lobby.leave(group)
        self.running.begin(group)
        if not group.started:
            group.started, group.queued = True, self._clock() - group.arrival
            self._stats.cache_queries += len(group.prompt)

    def _wait_again(self, group: Group) -> None:
        """Back to the queue: what is known stays, and all of it is to be computed again."""
        before = group.missing
        self.running.leave(group)
        group.restart()
        self._stats.recomputed += group.missing - before
        self._lobby.enter(group)

    def _preempt(self) -> Group:
        """The newest group gives way."""
        victim = self.running.newest
        if victim.pinned:
            raise RuntimeError("Pages lack although all groups that run are sure to fit.")
        self._wait_again(victim)
        victim.preempted += 1
        self._stats.preemptions += 1
        return victim

    # ── What the step meant ─────────────────────────────────────────────────────────────────────

    def advance(self, output: Output) -> list[Event]:
        """Read the oldest step in flight."""
        step = self._flying.popleft()
        self.pages.ended()
        reader = Reader(step, output, self._outbox, self._stats)
        for group in reader.bad():
            self._stats.nan_rows += 1
            self._end(group, "error", NumericalError(BAD))
        reader.scores()
        ended, grown = reader.samples(), reader.beams()
        for branch, end in step.rows:
            self._holdings.publish(branch, end)
        for branch in ended:
            self._finish(branch)
        for group, growth in grown:
            if growth.parents:
                self._holdings.regrow(group, growth.parents, growth.tokens)
            else:
                self._conclude(group)
        for group, _ in step.scores:
            if group.last < len(group.prompt) == len(group.scores):
                self._end_unsampled(group)
        self.running.trust()
        return self.events()

    def _finish(self, branch: Branch) -> None:
        """A branch has come to its end, maybe before those that grow out of it could."""
        group, finish = branch.group, branch.finish
        assert finish is not None
        if group.buds:
            self._holdings.sprout(group)
        group.branches.remove(branch)
        self._holdings.release([branch])
        if not group.living:
            self._end(group, finish)

    def _conclude(self, group: Group) -> None:
        """A beam search has stopped."""
        assert group.beams is not None
        self._end(group, "length" if group.beams.answers[0].stop is None else "stop")

    def _end_unsampled(self, group: Group) -> None:
        for index in range(group.request.n):
            self._outbox.choice(group, index).finish = "length"
        self._end(group, "length")

    def failed(self, why: KvistError) -> list[Event]:
        """The oldest step in flight raised: what it and those after it computed is not used.

        Everyone waits again. Those who were in it are suspects until something good comes of them,
        and only one of them runs at a time: if a step with a suspect raises, it is the suspect's
        doing. So one request's failure stays its own, and there are at most as many as requests.
        """
        steps, self._flying = self._flying, deque()
        for _ in steps:
            self.pages.ended()
        self._stats.retries += 1
        present, suspect = steps[0].groups(), self.running.suspect
        if suspect in present:
            self._end(suspect, "error", why)
        else:
            for group in present:
                group.suspect = True
        for group in dict.fromkeys(group for s in steps for group in s.groups() + s.begun):
            if group in self.running:
                self._wait_again(group)
        self._expire()
        return self.events()

    def events(self) -> list[Event]:
        """What happened since the last time, one event a request."""
        return self._outbox.take()

    # ── Numbers ─────────────────────────────────────────────────────────────────────────────────

    @property
    def idle(self) -> bool:
        """Nothing runs or waits, and everything was said."""
        return not self._groups and not self._flying and not self._outbox

    @property
    def stats(self) -> Stats:
        stats, pages = self._stats, self.pages
        stats.waiting, stats.running = len(self._lobby), len(self.running)
        stats.live, stats.cached, stats.free = pages.live, pages.cached, pages.free
        return stats

    def check(self) -> None:
        """Raise unless pages, seats and queue agree with the groups that exist."""
        self._holdings.check(list(self.running))
        if len(self.running) + len(self._lobby) != len(self._groups):
            raise RuntimeError("A request is lost between the queue and the steps.")


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1
