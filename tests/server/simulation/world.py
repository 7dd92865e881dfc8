"""Runs a script over production code, and checks after every step what must always hold."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from unittest.mock import patch

from model.batch import Batch, Output
from server.engine import group as group_module
from server.engine.engine import Engine
from server.engine.group import Branch, Group
from server.engine.pages import Pages
from server.engine.registry import Inbox, Registry
from server.engine.request import Choice, Event, Request
from server.engine.wire import Heard, Step, Submit, frame, to_engine, to_front
from server.errors import Duplicate, EngineDown, KvistError, QueueFull
from tests.server.simulation import oracle
from tests.server.simulation.executor import (
    Row,
    Simulated,
    Violation,
    hold,
    rows_of,
    slot,
)
from tests.server.simulation.oracle import Told
from tests.server.simulation.script import Knobs, Op
from tests.server.simulation.words import text

IDLE_STEPS = 3  # engine steps in a row that may do nothing while there is something to do
CALM = 61.0  # seconds after which no cancellation is remembered


class Watched(Pages):
    """Pages that evict in any order, and look at what is published."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs.pages, knobs.size, caching=knobs.caching)
        self.rng = Random(knobs.seed) if knobs.shuffled else None
        self.executor: Checked | None = None
        self.chains: dict[bytes, tuple[int, list[int]]] = {}  # a digest: how deep, and its tokens

    def _oldest(self) -> int:
        if self.rng is None:
            return super()._oldest()
        return self.rng.choice(list(self._idle))

    def note(self, parent: bytes, tokens: list[int], digest: bytes) -> None:
        """What a digest is made of."""
        self.chains[digest] = (self.chains[parent][0] + 1 if parent in self.chains else 0, tokens)

    def publish(self, page: int, digest: bytes) -> None:
        assert self.executor is not None
        flying = any(page in written for written in self.executor.flying)
        hold(not flying, "I6", "page", page, "is published while a step may write it")
        depth, tokens = self.chains[digest]
        right = [slot(token, at) for at, token in enumerate(tokens, depth * self.size)]
        hold(self.executor.page(page) == right, "I6", "page", page, "is published as another")
        super().publish(page, digest)


class Checked(Simulated):
    """An executor that looks at what it is told to do."""

    def __init__(self, knobs: Knobs, pages: Watched) -> None:
        super().__init__(knobs.pages, knobs.size)
        self.knobs, self.pages = knobs, pages
        pages.executor = self
        self.flying: deque[set[int]] = deque()  # pages that each step in flight writes
        self.salts: dict[int, str] = {}  # under which each page was written
        self.branches: Callable[[], list[Branch]] = list  # whose rows are launched
        self.samples = 0
        self.launched = 0

    def launch(self, batch: Batch) -> Callable[[], Output]:
        written = self._check(batch)
        self.launched += 1
        breaks = self.fail_wait
        self.flying.append(written)
        try:
            wait = super().launch(batch)
        except Exception:
            self.flying.pop()
            raise
        if breaks:  # nobody knows what a broken step has written
            for page in written:
                self.cache[page * self.size : (page + 1) * self.size] = [0xBAD] * self.size

        def waited() -> Output:
            self.flying.popleft()
            return wait()

        return waited

    def _check(self, batch: Batch) -> set[int]:
        options, size = self.knobs.options, self.size
        hold(len(batch.tokens) <= options.budget, "I12", len(batch.tokens), "tokens in a step")
        hold(0 < len(batch.lengths) <= options.seats, "I12", len(batch.lengths), "rows in a step")
        rows = rows_of(batch)
        places = [
            (row.pages[at // size], at % size)
            for row in rows
            for at in range(row.start, row.start + len(row.tokens))
        ]
        self._check_salts(batch, rows)
        hold(len(set(places)) == len(places), "I5", "two writes to one slot")
        written = {page for page, _ in places}
        targets = batch.copies[:, 1].tolist()
        sources = set(batch.copies[:, 0].tolist())
        hold(len(set(targets)) == len(targets), "I5", "two copies to one page")
        hold(not sources & set(targets), "I5", "a page is copied to and from")
        references, digests = self.pages._references, self.pages._digest
        for page in written | set(targets):
            hold(references[page] == 1, "I4", "page", page, "is written with", references[page])
            hold(digests[page] is None, "I4", "page", page, "is written and published")
        return written

    def _check_salts(self, batch: Batch, rows: list[Row]) -> None:
        """What a row reads was written for its own salt."""
        for source, target, _ in batch.copies.tolist():
            self.salts[target] = self.salts[source]
        for row, branch in zip(rows, self.branches(), strict=True):
            salt = branch.group.request.cache_salt
            full, end = -(-row.start // self.size), row.start + len(row.tokens)
            for page in row.pages[:full]:
                hold(self.salts[page] == salt, "I6", "a page of salt", self.salts[page], salt)
            for page in row.pages[full : -(-end // self.size)]:
                self.salts[page] = salt


class Reader:
    """Someone who asked: what was read so far, and how it ended."""

    def __init__(self, request: Request, inbox: Inbox) -> None:
        self.request, self.inbox = request, inbox
        self.told = {index: Told() for index in range(request.n)}
        self.first: Event | None = None
        self.last: Event | None = None
        self.gone = False  # nobody listens any more
        self.lazy = False  # reads only now and then

    def read(self, unread: Event) -> None:
        hold(self.last is None, "I7", self.request.id, "hears something after its end")
        if self.first is None:
            self.first = unread
        for choice in unread.choices:
            self._hear(choice, unread.error is not None)
        if unread.done:
            self.last = unread

    def _hear(self, choice: Choice, failed: bool) -> None:
        told = self.told[choice.index]
        again = told.finish is not None and not failed
        hold(not again, "I7", self.request.id, "goes on after choice", choice.index, "ended")
        told.tokens += choice.tokens
        told.text += choice.text
        told.logprobs += choice.logprobs
        told.ranks += choice.ranks
        told.top += choice.top
        told.finish, told.stop = choice.finish, choice.stop
        told.score, told.cumulative = choice.score, choice.cumulative_logprob


class World:
    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.now = 1000.0
        self.registry = Registry(knobs.unread)
        self.readers: dict[int, Reader] = {}
        self.alone: dict[str, list[Told]] = {}
        self.early: dict[int, float] = {}  # cancelled before they came, remembered until …
        self.cancels = self.accepted = self.preempted = 0
        self._start()

    def _start(self) -> None:
        knobs = self.knobs
        self.pages = Watched(knobs)
        self.executor = Checked(knobs, self.pages)
        self.engine = Engine(
            self.executor, self.pages, knobs.options, text=text, clock=lambda: self.now
        )
        scheduler = self.engine.scheduler
        self.executor.branches = lambda: [branch for branch, _ in scheduler._flying[-1].rows]
        self.given = self.ended = self.entered = self.still = 0
        self.begun: set[int] = set()
        self.again: set[int] = set()  # were preempted
        self.baseline = containers(self.engine, self.registry)

    def run(self, ops: list[Op]) -> None:
        with self._recording():
            for op in ops:
                getattr(self, f"_{op.name}")(op)
            self._drain()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Learn what the digests of pages are made of."""
        plain: Callable[[bytes, Iterable[int]], bytes] = vars(group_module)["link"]

        def link(parent: bytes, tokens: Iterable[int]) -> bytes:
            digest = plain(parent, tokens)
            self.pages.note(parent, list(tokens), digest)
            return digest

        with patch.object(group_module, "link", link):
            yield

    # Operations.

    def _submit(self, op: Op) -> None:
        request = op.request
        if request is None or op.number in self.readers:
            return
        inbox = self.registry.open(request.id)
        reader = self.readers[op.number] = Reader(request, inbox)
        if self.knobs.wire:
            (message,) = to_engine().feed(frame(Submit(request)))
            assert isinstance(message, Submit)
            request = message.request
        full, fits = self._is_full(request), self._fits(request)
        try:
            self.engine.submit(request)
        except KvistError as error:
            hold(not fits or isinstance(error, QueueFull), "I10", error, "but it fits")
            hold(full or not isinstance(error, QueueFull), "I15", error, "but it is not full")
            self.registry.close(inbox)
            reader.gone = True
            return
        hold(fits, "I10", request.id, "can never fit, and was let in")
        hold(not full, "I15", request.id, "was let in to a full queue")
        self.entered += 1
        self.accepted += 1
        self._collect()
        if self.early.get(op.number, 0.0) > self.now:
            hold(reader.last, "I13", request.id, "was cancelled before it came, and runs")

    def _fits(self, request: Request) -> bool:
        """The worst case, page by page."""
        size, prompt = self.knobs.size, len(request.prompt)
        width = request.beams.width if request.beams else request.n
        end = prompt + max(request.max_tokens, 1) - 1
        pages: set[object] = set()
        for branch in range(width if request.max_tokens > 1 else 1):
            for at in range(0, end, size):
                pages.add(at if at + size <= prompt else (at, branch))
        room = self.knobs.options.seats
        room = min(room, self.knobs.options.budget) if request.beams else room
        return len(pages) <= self.knobs.pages and width <= room

    def _is_full(self, request: Request) -> bool:
        options, waiting = self.knobs.options, waiting_in(self.engine)
        width = request.beams.width if request.beams else request.n
        queued = sum(group.weight for group in waiting)
        most = options.queue_tokens or 4 * self.knobs.pages * self.knobs.size
        over = queued + len(request.prompt) + width * min(request.max_tokens, 512) > most
        return len(waiting) >= options.queue or (bool(waiting) and over)

    def _step(self, op: Op) -> None:
        for _ in range(op.number):
            self._one()

    def _cancel(self, op: Op) -> None:
        reader = self.readers.get(op.number)
        self.cancels += reader is not None and not reader.gone
        if reader is None:
            self.early[op.number] = self.now + 60.0
        self.engine.cancel(f"r{op.number}")
        self._collect()
        if reader is not None and not reader.gone:
            hold(reader.inbox.done, "I13", reader.request.id, "was cancelled, and runs")
        self.check()

    def _disconnect(self, op: Op) -> None:
        reader = self.readers.get(op.number)
        if reader is not None and not reader.gone:
            self.cancels += 1
            reader.gone = True
            if self.registry.close(reader.inbox):
                self.engine.cancel(reader.request.id)
                self._collect()

    def _read(self, op: Op) -> None:
        """A reader that becomes slow; or, if it is, reads for once."""
        reader = self.readers.get(op.number)
        if reader is not None and reader.lazy:
            self._take(reader)
        elif reader is not None:
            reader.lazy = True

    def _reset(self, op: Op) -> None:
        self.pages.reset()

    def _tick(self, op: Op) -> None:
        self.now += op.seconds

    def _wall(self, op: Op) -> None:
        """The wall clock jumps: nobody looks at it, see `no_wall_clock` in the test."""

    def _duplicate(self, op: Op) -> None:
        """An id that is in use is used again."""
        id = f"r{op.number}"
        again = Request(id=id, prompt=[1], max_tokens=1)
        if id in live(self.engine):
            hold(_refuses(lambda: self.engine.submit(again)), "I7", id, "is in the engine twice")
        if id in self.registry:
            hold(_refuses(lambda: self.registry.open(id)), "I7", id, "is in the front twice")

    def _launch(self, op: Op) -> None:
        self.executor.fail_launch = True

    def _wait(self, op: Op) -> None:
        self.executor.fail_wait = True

    def _nan(self, op: Op) -> None:
        self.executor.nan_row = op.number

    def _die(self, op: Op) -> None:
        """The process is gone; the front tells everybody, and has another."""
        self.registry.fail(EngineDown("It died."))
        for reader in self.readers.values():
            self._take(reader)
        self.early.clear()
        self._start()

    # A step, and what must hold after it.

    def _one(self) -> None:
        before, launched = len(live(self.engine)), self.executor.launched
        events = self.engine.step()
        moved = events or self.executor.launched > launched or not before
        self.still = 0 if moved else self.still + 1
        hold(self.still <= IDLE_STEPS, "I8", "nothing moves, and there is something to do")
        self._deliver(events)
        self._check_order()
        self._count()
        for group in live(self.engine).values():
            seconds = group.request.deadline
            late = seconds is not None and group.arrival + seconds < self.now
            hold(not late, "I16", group.request.id, "is past its deadline")
            hold(group.preempted <= 3, "I9", group.request.id, "is preempted", group.preempted)
        if moved and before and (self.knobs.pages <= 256 or self.executor.launched % 16 == 0):
            self.check()

    def _collect(self) -> None:
        """What the engine has to say without a step."""
        self._deliver(self.engine.scheduler.events())

    def _deliver(self, events: list[Event]) -> None:
        self.given += sum(len(choice.tokens) for event in events for choice in event.choices)
        self.ended += sum(event.done for event in events)
        hold(len({event.id for event in events}) == len(events), "I7", "two events of one request")
        if self.knobs.wire and events:
            (message,) = to_front().feed(frame(Step(events, self.engine.stats)))
            assert isinstance(message, Heard)
            events = list(message.events)
        slow = self.registry.deliver(events)
        for event in events:
            reader = self.readers[int(event.id[1:])]
            if not reader.lazy:
                self._take(reader)
        for id in slow:
            self.engine.cancel(id)
        if slow:
            self._collect()

    def _count(self) -> None:
        """For the report: how many were ever preempted."""
        for group in self.engine.scheduler.running:
            if group.preempted and group.number not in self.again:
                self.again.add(group.number)
                self.preempted += 1

    def _take(self, reader: Reader) -> None:
        event = reader.inbox.take()
        if event is None or reader.gone:
            return
        reader.read(event)
        if reader.last is not None:
            self.registry.close(reader.inbox)
            self._judge(reader)
            reader.gone = True

    def _check_order(self) -> None:
        """First come first served: nobody who waits goes before a newcomer."""
        scheduler = self.engine.scheduler
        new = [group for group in scheduler.running if group.number not in self.begun]
        waiting = waiting_in(self.engine)
        if new and waiting:
            last = max((group.key, group.number) for group in new)
            first = min((group.key, group.number) for group in waiting)
            hold(last < first, "I9", new[-1].request.id, "overtook someone who waits")
        self.begun.update(group.number for group in new)

    def check(self) -> None:
        scheduler, stats = self.engine.scheduler, self.engine.stats
        try:
            scheduler.check()
        except RuntimeError as error:
            raise Violation(f"I1 I2 I3: {error}") from error
        waiting = waiting_in(self.engine)
        lobby = scheduler._lobby
        hold(lobby._tokens == sum(g.weight for g in waiting), "I15", "tokens that wait")
        pinned = sum(group.footprint for group in scheduler.running if group.pinned)
        hold(scheduler.running.pinned == pinned, "I15", "pages of pinned groups")
        hold(stats.waiting == len(waiting), "I15", "waiting")
        hold(stats.running == len(scheduler.running), "I15", "running")
        hold(stats.live + stats.cached + stats.free == stats.pages, "I1", "pages")
        hold(stats.output_tokens == self.given, "I15", stats.output_tokens, "≠", self.given)
        over = sum(stats.finished.values())
        hold(over == self.ended == self.entered - len(live(self.engine)), "I15", "finished")
        if not scheduler._flying:
            read = {page for group in scheduler.running for b in group.living for page in b.pages}
            hold(len(read) == stats.live, "I13", "pages are held that nobody reads")

    # The end of a request, and of the run.

    def _judge(self, reader: Reader) -> None:
        request, first, last = reader.request, reader.first, reader.last
        assert first is not None
        assert last is not None
        if request.id not in self.alone:
            self.alone[request.id] = oracle.alone(request)
        whole = last.error is None and all(
            told.finish in ("stop", "length") for told in reader.told.values()
        )
        pairs = zip(reader.told.values(), self.alone[request.id], strict=True)
        for index, (told, expected) in enumerate(pairs):
            if whole or told.finish in ("stop", "length"):
                hold(told == expected, "I11", request.id, index, told, "≠", expected)
            else:
                _is_part(told, expected, request.id, index)
        if first.code != "engine_down":
            hold(first.prompt_tokens == len(request.prompt), "I11", request.id, "prompt_tokens")
        if whole and request.prompt_logprobs is not None:
            expected_scores = oracle.prompt_logprobs(request)
            hold(first.prompt_logprobs == expected_scores, "I11", request.id, "prompt_logprobs")
        self._check_cached(request, first.cached_tokens)
        self._check_error(reader, last)

    def _check_cached(self, request: Request, cached: int) -> None:
        hold(cached < len(request.prompt), "I11", request.id, "found its whole prompt")
        hold(not cached or self.knobs.caching, "I6", "a cache that is off is used")

    def _check_error(self, reader: Reader, last: Event) -> None:
        request, knobs = reader.request, self.knobs
        allowed = {
            None: True,
            "slow_client": reader.lazy,
            "deadline_exceeded": request.deadline is not None,
            "queue_timeout": request.queue_timeout is not None,
            "numerical_error": knobs.faults,
            "step_failed": knobs.faults,
            "engine_down": knobs.faults,
        }
        hold(allowed.get(last.code, False), "I11", request.id, "ended with", last.code, last.error)

    def _drain(self) -> None:
        """Nothing new comes; everything ends, and nothing is left."""
        self.executor.fail_launch = self.executor.fail_wait = False
        self.executor.nan_row = -1
        steps = 0
        while not self.engine.idle:
            self._one()
            steps += 1
            hold(steps < 20_000, "I8", "it never ends")
        for reader in self.readers.values():
            self._take(reader)
            hold(reader.gone, "I7", reader.request.id, "never ended")
        self.now += CALM
        self.engine.step()
        hold(self.engine.stats.live == 0, "I14", self.engine.stats.live, "pages are live at idle")
        left = containers(self.engine, self.registry)
        changed = {name: size for name, size in left.items() if size != self.baseline.get(name)}
        hold(not changed, "I14", "what is left at idle:", changed)


def live(engine: Engine) -> dict[str, Group]:
    return engine.scheduler._groups


def waiting_in(engine: Engine) -> list[Group]:
    return [group for _, _, group in engine.scheduler._lobby._waiting]


def containers(*roots: object) -> dict[str, int]:
    """How much is in every container of the engine and the front, wherever it is."""
    found: dict[str, int] = {}
    kept = ("_free", "_idle", "_index", "_stats", "_table", "executor", "chains", "info", "answers")
    queue = [(type(root).__name__, root) for root in roots]
    while queue:
        path, thing = queue.pop()
        for name, value in vars(thing).items():
            if name in kept or name == "options":
                continue
            if isinstance(value, list | dict | deque | set):
                found[f"{path}.{name}"] = len(value)
            elif type(value).__module__.startswith("server.engine") and hasattr(value, "__dict__"):
                queue.append((f"{path}.{name}", value))
    return found


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except Duplicate:
        return True
    return False


def _is_part(told: Told, expected: Told, *who: object) -> None:
    count = len(told.tokens)
    hold(told.tokens == expected.tokens[:count], "I11", who, told.tokens, "≠", expected.tokens)
    hold(expected.text.startswith(told.text), "I11", who, told.text, "≠", expected.text)
    hold(told.logprobs == expected.logprobs[: len(told.logprobs)], "I11", who, "logprobs")
