"""An executor without a network, in which every wrong page, seat or copy becomes another text.

Its cache holds in each slot a hash of the (token, position) written there. What it answers is a
hash of all slots that a row reads back through its page table, and, where sampling looks back, of
what the row's seat remembers. An oracle computes the same from the tokens alone, see oracle.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from model.batch import LAST_SAMPLE, Batch, Floats, Ints, Output, Seat
from model.sampling import Sampling

WORD = (1 << 64) - 1
VOCABULARY = 61  # prime, so that any stride meets all ids


def mix(*values: int) -> int:
    """Several numbers shaken into one of 64 bits (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & WORD)) * 0xBF58476D1CE4E5B9 & WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
        state ^= state >> 31
    return state


def slot(token: int, position: int) -> int:
    """What a token writes at a position; a context is the sum of what its slots hold."""
    value = ((token + 1) * 0xD6E8FEB86659FD93 ^ (position + 1) * 0xA0761D6478BD642F) & WORD
    return value * (value >> 29) & WORD


def draw(context: int, past: int, sampling: Sampling, branch: int, nth: int, position: int) -> int:
    """The token at `position`, the branch's `nth`."""
    mind = mix(context, past if sampling.looks_back else 0)
    if not sampling.greedy:
        mind = mix(mind, sampling.seed, branch, position)
    token = mind % VOCABULARY
    while nth < sampling.min_tokens and token in sampling.stops:
        token = (token + 1) % VOCABULARY
    return token


def logprob(context: int, token: int) -> tuple[float, int]:
    """Of any token, and its rank."""
    value = mix(context, token, 5)
    return -(value % 4096) / 256, 1 + value % VOCABULARY


def rivals(context: int, count: int) -> list[tuple[int, float]]:
    first = mix(context, 7)
    return [((first + i) % VOCABULARY, -0.125 * (i + 1)) for i in range(count)]


def successors(context: int, past: int, sampling: Sampling, count: int) -> list[tuple[int, float]]:
    """For beams: distinct tokens, falling, and no two contexts alike."""
    mind = mix(context, past if sampling.looks_back else 0, 11)
    stride, scale = 1 + mind % (VOCABULARY - 1), 0.2 + mind % 9973 / 9973
    return [((mind + i * stride) % VOCABULARY, -scale * (i + 1)) for i in range(count)]


@dataclass
class Sitting:
    """What a seat remembers."""

    seat: Seat
    last: int = LAST_SAMPLE
    past: int = 0  # of what was said so far, for those who look back
    known: int = 0

    @property
    def hears(self) -> bool:
        return self.seat.sampling.looks_back


class OutOfMemory(RuntimeError):
    """What a device says."""


class Violation(BaseException):
    """An invariant does not hold. Not an `Exception`: the engine survives those."""


def hold(condition: object, invariant: str, *about: object) -> None:
    if not condition:
        raise Violation(f"{invariant}: {' '.join(map(str, about))}")


class Row(NamedTuple):
    """A row as lists, which are faster than arrays for as few tokens as there are here."""

    seat: int
    tokens: list[int]
    start: int  # position of the first
    pages: list[int]


class Simulated:
    """Runs batches as they are launched, in order; the result is there when it is asked for."""

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self.cache = [0] * (pages * size)
        self.seats: dict[int, Sitting] = {}
        self.fail_launch = self.fail_wait = False  # the next one
        self.nan_row = -1  # of the next batch, modulo its rows

    def launch(self, batch: Batch) -> Callable[[], Output]:
        if self.fail_launch:
            self.fail_launch = False
            raise OutOfMemory("launch")
        for seat in batch.taken:
            self.seats[seat.seat] = self._sit(seat)
        for to, copy in [(to, replace(self.seats[seat])) for seat, to in batch.forks.tolist()]:
            self.seats[to] = copy
        for source, target, count in batch.copies.tolist():
            at = source * self.size
            self.cache[target * self.size : target * self.size + count] = self.cache[
                at : at + count
            ]
        output = self._run(batch, rows_of(batch))
        if self.fail_wait:
            self.fail_wait = False
            return self._fail
        return lambda: output

    def _fail(self) -> Output:
        raise OutOfMemory("wait")

    def page(self, page: int) -> list[int]:
        return self.cache[page * self.size : (page + 1) * self.size]

    def _sit(self, seat: Seat) -> Sitting:
        known = seat.prompt + seat.output
        past = sum(slot(token, at) for at, token in enumerate(known)) & WORD
        return Sitting(seat, past=past, known=len(known))

    def _run(self, batch: Batch, rows: list[Row]) -> Output:
        places = [place for row in rows for place in self._write(row)]
        drawn, said = [], []
        for at, seat in zip(batch.sample_at.tolist(), batch.sample_seat.tolist(), strict=True):
            context = self._context(*places[at])
            drawn.append(self._sample(context, seat, places[at][1] + 1))
            said.append(context)
        asked = [self._context(*places[at]) for at in batch.score_at.tolist()]
        chances = [logprob(*pair) for pair in zip(said, drawn, strict=True)]
        scored = [logprob(*pair) for pair in zip(asked, batch.score_token.tolist(), strict=True)]
        beams = [
            self._successors(self._context(*places[at]), seat, batch.beam_width)
            for at, seat in zip(batch.beam_at.tolist(), batch.beam_seat.tolist(), strict=True)
        ]
        bad = np.zeros(len(rows), np.int32)
        if self.nan_row >= 0:
            bad[self.nan_row % len(rows)] = 1
            self.nan_row = -1
        top, most = batch.top, batch.beam_width
        some = [rivals(context, top) for context in said] if batch.logprobs else []
        others = [rivals(context, top) for context in asked]
        return Output(
            tokens=np.array(drawn, np.int32),
            logprobs=np.array([chance for chance, _ in chances], np.float32),
            ranks=np.array([rank for _, rank in chances], np.int32),
            top_tokens=_ids(some, top),
            top_logprobs=_chances(some, top),
            score_logprobs=np.array([chance for chance, _ in scored], np.float32),
            score_ranks=np.array([rank for _, rank in scored], np.int32),
            score_top_tokens=_ids(others, top),
            score_top_logprobs=_chances(others, top),
            beam_tokens=_ids(beams, most),
            beam_logprobs=_chances(beams, most),
            bad=bad,
        )

    def _write(self, row: Row) -> list[tuple[list[int], int]]:
        """Tokens into pages; each one's pages and position."""
        sitting, places = self.seats.get(row.seat), []
        for position, token in enumerate(row.tokens, row.start):
            if token == LAST_SAMPLE:
                token = sitting.last if sitting is not None else LAST_SAMPLE
                hold(token != LAST_SAMPLE, "I11", "a row asks for a sample that nobody drew")
            value = slot(token, position)
            page, offset = divmod(position, self.size)
            self.cache[row.pages[page] * self.size + offset] = value
            if sitting is not None and sitting.hears and position >= sitting.known:
                hold(position == sitting.known, "I11", "seat", row.seat, "missed a token")
                sitting.past = (sitting.past + value) & WORD
                sitting.known += 1
            places.append((row.pages, position))
        return places

    def _context(self, pages: list[int], position: int) -> int:
        """The sum of what a row reads back, up to this position."""
        size, cache = self.size, self.cache
        full, rest = divmod(position + 1, size)
        total = sum(sum(cache[page * size : (page + 1) * size]) for page in pages[:full])
        if rest:
            total += sum(cache[pages[full] * size : pages[full] * size + rest])
        return total & WORD

    def _sample(self, context: int, seat: int, position: int) -> int:
        sitting = self.seats[seat]
        who = sitting.seat
        nth = position - who.start
        sitting.last = draw(context, sitting.past, who.sampling, who.branch, nth, position)
        return sitting.last

    def _successors(self, context: int, seat: int, count: int) -> list[tuple[int, float]]:
        sitting = self.seats[seat]
        return successors(context, sitting.past, sitting.seat.sampling, count)


def rows_of(batch: Batch) -> list[Row]:
    tokens, starts, lengths = batch.tokens.tolist(), batch.starts.tolist(), batch.lengths.tolist()
    return [
        Row(seat, tokens[first:end], length - (end - first), pages)
        for seat, first, end, length, pages in zip(
            batch.seats.tolist(),
            starts,
            starts[1:],
            lengths,
            batch.page_table.tolist(),
            strict=False,
        )
    ]


NO_IDS, NO_CHANCES = np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)


def _ids(rows: list[list[tuple[int, float]]], width: int) -> Ints:
    if not rows:
        return NO_IDS
    return np.array([[token for token, _ in row] for row in rows], np.int32).reshape(
        len(rows), width
    )


def _chances(rows: list[list[tuple[int, float]]], width: int) -> Floats:
    if not rows:
        return NO_CHANCES
    flat = np.array([[chance for _, chance in row] for row in rows], np.float32)
    return flat.reshape(len(rows), width)
