"""An executor without a network, in which every wrong page, seat or copy becomes another text.

Its cache holds in each slot a hash of the (token, position) written there. What it answers is a
hash of all slots that a row reads back through its page table, and, where sampling looks back, of
what the row's seat remembers. An oracle computes the same from the tokens alone, see oracle.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from model.batch import LAST_SAMPLE, Batch, Floats, Ints, Output, Seat
from model.sampling import Sampling

Longs = npt.NDArray[np.uint64]
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


def slots(tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Longs:
    """The same for many."""
    values = (tokens + 1).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    values ^= (positions + 1).astype(np.uint64) * np.uint64(0xA0761D6478BD642F)
    return values * (values >> np.uint64(29))


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


class OutOfMemory(RuntimeError):
    """What a device says."""


class Simulated:
    """Runs batches as they are launched, in order; the result is there when it is asked for."""

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self.cache = np.zeros(pages * size, np.uint64)
        self.seats: dict[int, Sitting] = {}
        self.fail_launch = self.fail_wait = False  # the next one
        self.nan_row = -1  # of the next batch, modulo its rows
        self.steps = self.computed = 0

    def launch(self, batch: Batch) -> Callable[[], Output]:
        if self.fail_launch:
            self.fail_launch = False
            raise OutOfMemory("launch")
        self.steps += 1
        self.computed += len(batch.tokens)
        for seat in batch.taken:
            self.seats[seat.seat] = self._sit(seat)
        for to, copy in [(to, replace(self.seats[seat])) for seat, to in batch.forks.tolist()]:
            self.seats[to] = copy
        for source, target, count in batch.copies.tolist():
            self._page(target)[:count] = self._page(source)[:count].copy()
        output = self._run(batch)
        if self.fail_wait:
            self.fail_wait = False
            return self._fail
        return lambda: output

    def _fail(self) -> Output:
        raise OutOfMemory("wait")

    def _page(self, page: int) -> Longs:
        return self.cache[page * self.size : (page + 1) * self.size]

    def _sit(self, seat: Seat) -> Sitting:
        known = seat.prompt + seat.output
        past = sum(slot(token, at) for at, token in enumerate(known)) & WORD
        return Sitting(seat, past=past, known=len(known))

    def _run(self, batch: Batch) -> Output:
        counts = np.diff(batch.starts)
        row = np.repeat(np.arange(len(counts)), counts)  # [tokens] whose row
        positions = np.arange(len(batch.tokens)) - (batch.starts[1:] - batch.lengths)[row]
        tokens = self._tokens(batch, counts, positions)
        at = batch.page_table[row, positions // self.size].astype(np.int64) * self.size
        self.cache[at + positions % self.size] = slots(tokens, positions)
        wanted = np.concatenate([batch.sample_at, batch.score_at, batch.beam_at]).astype(np.int64)
        contexts = self._contexts(batch, row[wanted], positions[wanted])
        samples, scores = len(batch.sample_at), len(batch.score_at)
        places = positions[wanted].tolist()
        bad = np.zeros(len(counts), np.int32)
        if self.nan_row >= 0:
            bad[self.nan_row % len(counts)] = 1
            self.nan_row = -1
        drawn = self._sample(batch, contexts[:samples], places)
        asked = contexts[samples : samples + scores]
        chances = [logprob(*pair) for pair in zip(contexts, drawn, strict=False)]
        scored = [logprob(*pair) for pair in zip(asked, batch.score_token.tolist(), strict=True)]
        beams = self._beams(batch, contexts[samples + scores :])
        top, most = batch.top, batch.beam_width
        return Output(
            tokens=np.array(drawn, np.int32),
            logprobs=_floats([chance for chance, _ in chances]),
            ranks=np.array([rank for _, rank in chances], np.int32),
            top_tokens=_ids([rivals(c, top) for c in contexts[:samples]], top),
            top_logprobs=_chances([rivals(c, top) for c in contexts[:samples]], top),
            score_logprobs=_floats([chance for chance, _ in scored]),
            score_ranks=np.array([rank for _, rank in scored], np.int32),
            score_top_tokens=_ids([rivals(c, top) for c in asked], top),
            score_top_logprobs=_chances([rivals(c, top) for c in asked], top),
            beam_tokens=_ids(beams, most),
            beam_logprobs=_chances(beams, most),
            bad=bad,
        )

    def _tokens(
        self, batch: Batch, counts: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Ids, the unknown ones from their seats, which hear what is news to them."""
        tokens = batch.tokens.astype(np.int64)
        firsts, seats = batch.starts[:-1].tolist(), batch.seats.tolist()
        for first, count, seat in zip(firsts, counts.tolist(), seats, strict=True):
            if count == 1 and tokens[first] == LAST_SAMPLE:
                tokens[first] = self.seats[seat].last
            sitting = self.seats.get(seat)
            if sitting is not None and sitting.seat.sampling.looks_back:
                for i in range(first, first + count):
                    if positions[i] >= sitting.known:
                        assert positions[i] == sitting.known, "a seat missed a token"
                        sitting.past = (
                            sitting.past + slot(int(tokens[i]), int(positions[i]))
                        ) & WORD
                        sitting.known += 1
        assert (tokens >= 0).all(), "a row asks for a sample that nobody drew"
        return tokens

    def _contexts(
        self, batch: Batch, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> list[int]:
        """The sum of what each wanted row reads back, up to its position."""
        if not len(rows):
            return []
        counts = positions + 1
        ends = np.cumsum(counts)
        which = np.repeat(np.arange(len(rows)), counts)
        at = np.arange(ends[-1]) - (ends - counts)[which]
        pages = batch.page_table[rows[which], at // self.size].astype(np.int64)
        read = self.cache[pages * self.size + at % self.size]
        contexts: list[int] = np.add.reduceat(read, ends - counts).tolist()
        return contexts

    def _sample(self, batch: Batch, contexts: Sequence[int], positions: list[int]) -> list[int]:
        drawn = []
        for context, seat, at in zip(contexts, batch.sample_seat.tolist(), positions, strict=False):
            sitting = self.seats[seat]
            who, nth = sitting.seat, at + 1 - sitting.seat.start
            token = draw(context, sitting.past, who.sampling, who.branch, nth, at + 1)
            sitting.last = token
            drawn.append(token)
        return drawn

    def _beams(self, batch: Batch, contexts: Sequence[int]) -> list[list[tuple[int, float]]]:
        found = []
        for context, seat in zip(contexts, batch.beam_seat.tolist(), strict=True):
            sitting = self.seats[seat]
            sampling = sitting.seat.sampling
            found.append(successors(context, sitting.past, sampling, batch.beam_width))
        return found


def _floats(values: list[float]) -> Floats:
    return np.array(values, np.float32)


def _ids(rows: list[list[tuple[int, float]]], width: int) -> Ints:
    return np.array([[token for token, _ in row] for row in rows], np.int32).reshape(
        len(rows), width
    )


def _chances(rows: list[list[tuple[int, float]]], width: int) -> Floats:
    flat = np.array([[chance for _, chance in row] for row in rows], np.float32)
    return flat.reshape(len(rows), width)
