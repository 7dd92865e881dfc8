"""A step in the making: the batch that goes down, and who hears what when its output comes back."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.batch import LAST_SAMPLE, Batch, Ints, Seat
from server.engine.group import Branch, Group
from server.engine.holdings import Copy, Table
from server.engine.masks import follow


@dataclass(slots=True)
class Step:
    """What a launched batch was made of, in its order."""

    rows: list[tuple[Branch, int]] = field(default_factory=list)  # a branch, computed up to here
    samples: list[tuple[Branch, int, list[int]]] = field(default_factory=list)
    # who samples, the first of its samples, and the guesses that those after it verify
    scores: list[tuple[Group, int]] = field(default_factory=list)  # whose prompt, how many of it
    beams: list[tuple[Group, int]] = field(default_factory=list)  # whose beams, the first of them
    begun: list[Group] = field(default_factory=list)  # whose seats are taken in it
    alone: bool = False  # its output decides what the next step is, which cannot be launched ahead

    def groups(self) -> list[Group]:
        """Whose rows are in it, each once, unless its last event is made."""
        return list(dict.fromkeys(b.group for b, _ in self.rows if not b.group.over))


class Rows:
    """Rows are added until the token budget is spent."""

    def __init__(self, table: Table, budget: int) -> None:
        self.left = budget
        self.step = Step()
        self.copies: list[Copy] = []
        self.taken: list[Seat] = []
        self._table = table
        self._tokens: list[int] = []
        self._starts = [0]
        self._lengths: list[int] = []
        self._seats: list[int] = []
        self._sample_at: list[int] = []
        self._sample_seat: list[int] = []
        self._score_at: list[int] = []
        self._score_token: list[int] = []
        self._beam_at: list[int] = []
        self._beam_seat: list[int] = []
        self._mask_at: list[int] = []
        self._masks: list[Ints] = []
        self._forks: list[tuple[int, int]] = []
        self._widest = 1
        self._beam_width = 0
        self._top = 0
        self._logprobs = False

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def add(self, branch: Branch, count: int, guess: list[int]) -> None:
        """The next `count` tokens of a branch that owns the pages for them, and guesses."""
        guess = self._restrict(branch, count, guess)
        start, end = branch.computed, branch.computed + count
        first = len(self._tokens)
        if count == 1 and start == len(branch.group.prompt) + len(branch.output):
            self._tokens.append(LAST_SAMPLE)
        else:
            self._tokens += branch.tokens(start, end)
        if guess:
            self._tokens += guess
        total = count + len(guess)
        self.left -= total
        self._starts.append(first + total)
        self._lengths.append(start + total)
        self._seats.append(branch.seat)
        self._widest = max(self._widest, len(branch.pages))
        branch.computed = start + total
        self.step.rows.append((branch, end))
        group = branch.group
        if group.request.prompt_logprobs is not None:
            self._score(branch, start, end, first)
        if end == branch.length:
            self._want(branch, first + count - 1, guess)

    def _restrict(self, branch: Branch, count: int, guess: list[int]) -> list[int]:
        """Mask what follows the tokens that are sampled from; the guesses that can come true."""
        if branch.mask is None or branch.computed + count < branch.length:
            return guess
        found = follow(branch.mask, guess, branch.group.stops)
        for at, words in enumerate(found, len(self._tokens) + count - 1):
            if words is not None:
                self._mask_at.append(at)
                self._masks.append(words)
        self.step.alone = True
        return guess[: len(found) - 1]

    def _want(self, branch: Branch, at: int, guess: list[int]) -> None:
        """The row reaches its branch's end: draw, or look for beams."""
        group = branch.group
        if group.beams is not None:
            self._beam(branch, group.beams.candidates, at)
            return
        self._sample(branch, at, guess)
        for bud in group.buds:
            if bud.source is branch and bud.length == bud.fork_at == branch.length - 1:
                self._sample(bud, at, [])

    def _sample(self, branch: Branch, at: int, guess: list[int]) -> None:
        count = 1 + len(guess)
        self.step.samples.append((branch, len(self._sample_at), guess))
        self._sample_at += range(at, at + count)
        self._sample_seat += [branch.seat] * count
        branch.length += 1
        group = branch.group
        self.step.alone = self.step.alone or group.draft > 0
        if group.request.logprobs is not None:
            self._logprobs = True
            self._top = max(self._top, group.request.logprobs)

    def _score(self, branch: Branch, start: int, end: int, first: int) -> None:
        """The prompt's log-probabilities that this row finds and nothing found before."""
        group = branch.group
        begin, stop = max(start, group.scored), min(end, len(group.prompt) - 1)
        if begin >= stop:
            return
        self._score_at += range(first + begin - start, first + stop - start)
        self._score_token += group.prompt[begin + 1 : stop + 1]
        self._top = max(self._top, group.request.prompt_logprobs or 0)
        self.step.scores.append((group, stop - begin))
        group.scored = stop

    def _beam(self, branch: Branch, candidates: int, at: int) -> None:
        group = branch.group
        if branch is group.branches[0]:
            self.step.beams.append((group, len(self._beam_at)))
            self._forks += group.forks
            group.forks = []
        self._beam_at.append(at)
        self._beam_seat.append(branch.seat)
        self._beam_width = max(self._beam_width, candidates)
        self.step.alone = True

    def batch(self) -> Batch:
        seats = _ints(self._seats)
        return Batch(
            tokens=_ints(self._tokens),
            starts=_ints(self._starts),
            lengths=_ints(self._lengths),
            page_table=self._table.of(seats, self._widest),
            seats=seats,
            sample_at=_ints(self._sample_at),
            sample_seat=_ints(self._sample_seat),
            score_at=_ints(self._score_at),
            score_token=_ints(self._score_token),
            beam_at=_ints(self._beam_at),
            beam_seat=_ints(self._beam_seat),
            beam_width=self._beam_width,
            top=self._top,
            logprobs=self._logprobs,
            mask_at=_ints(self._mask_at),
            masks=np.stack(self._masks) if self._masks else np.zeros((0, 0), np.int32),
            copies=_ints(self.copies).reshape(-1, 3),
            taken=self.taken,
            forks=_ints(self._forks).reshape(-1, 2),
        )


def _ints(values: list[int] | list[tuple[int, int]] | list[Copy]) -> Ints:
    array: npt.NDArray[np.int32] = np.array(values, np.int32)
    return array
