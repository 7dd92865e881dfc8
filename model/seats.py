"""Where branches sit between steps: what their draws depend on, for many of them as tensors.

What a draw needs is small and known to the host (parameters, positions, random bits), so it lives
there and goes up with each step; only what grows by tokens that the host may not know yet lives
on the device, and only for the seats that ask for it:

    counts   [slots, vocabulary]  2 · how often a token was drawn, + 1 if it is in the prompt
    history  [slots, positions]   the tokens themselves, where bad words are matched
    masks    [slots, words]       the bits of allowed ids
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.penalties import penalise
from kernels.sampling import branch_key, sample, uniform_bits
from kernels.topk import top_logprobs
from model.batch import Seat
from model.shelf import Shelf

Ints = npt.NDArray[np.integer]
Edits = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]
# ids, what is added to their logits, and before which position: bias, and −inf for bans

Words = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
# bad words of several tokens: all but the last, the nearest first, [words, longest]; the last

Held = TypeVar("Held")

ANY, NEVER = -1, -2  # in place of a token
EVER = np.iinfo(np.int64).max


class Seats:
    """What `Batch.taken` put into every seat, and what became of it since."""

    def __init__(self, capacity: int, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.vocabulary, self.device = vocabulary, torch.device(device)
        self.settings = np.zeros((capacity, 5), np.float32)  # see kernels/sampling.py; all greedy
        self.penalties = np.tile(np.array([1, 0, 0], np.float32), (capacity, 1))
        self.keys = np.zeros(capacity, np.uint64)
        self.known = np.zeros(capacity, np.int64)  # positions below have been counted
        self.edits: dict[int, Edits] = {}
        self.words: dict[int, Words] = {}
        self.counts = Shelf(capacity, vocabulary, torch.int32, self.device)
        self.history = Shelf(capacity, 0, torch.int64, self.device)
        self.masks = Shelf(capacity, -(-vocabulary // 32), torch.int32, self.device)

    # -- who sits where ---------------------------------------------------------------------------

    def take(self, taken: Seat) -> None:
        seat, sampling = taken.seat, taken.sampling
        filters = (sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p)
        self.settings[seat] = (0 if sampling.greedy else sampling.temperature, *filters)
        self.penalties[seat] = (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        self.keys[seat] = branch_key(sampling.seed, taken.branch)
        self.known[seat] = len(taken.prompt) + len(taken.output)
        self._take_edits(taken)
        self._take_past(taken)
        self.restrict(seat, sampling.allowed)

    def restrict(self, seat: int, allowed: Sequence[int] | npt.NDArray[np.bool_]) -> None:
        """Only these ids from now on; none named: every id. Ids, or one truth an id."""
        if not len(allowed):
            self.masks.drop(seat)
            return
        bits = np.zeros(self.masks.rows.shape[1] * 32, np.uint8)
        bits[: self.vocabulary][np.asarray(allowed)] = 1
        words = np.packbits(bits, bitorder="little").view(np.int32)
        self.masks.take(seat).copy_(self._up(words))

    def fork(self, pairs: Ints) -> None:
        """pairs [forks, 2] from, to: `to` continues what `from` has seen, with draws of its own."""
        sources, targets = pairs[:, 0].tolist(), pairs[:, 1].tolist()
        for table in (self.settings, self.penalties, self.known):
            table[targets] = table[sources]
        _copy_held(self.edits, sources, targets)
        _copy_held(self.words, sources, targets)
        for shelf in (self.counts, self.history, self.masks):
            shelf.copy(sources, targets)

    def _take_edits(self, taken: Seat) -> None:
        sampling = taken.sampling
        bans = [word[0] for word in sampling.bad_words if len(word) == 1]
        stops = list(sampling.stops) if sampling.min_tokens else []
        ids = [*sampling.logit_bias, *bans, *stops]
        added = [*sampling.logit_bias.values(), *[-np.inf] * (len(bans) + len(stops))]
        before = [EVER] * (len(ids) - len(stops)) + [taken.start + sampling.min_tokens] * len(stops)
        self.edits.pop(taken.seat, None)
        if ids:
            self.edits[taken.seat] = (
                np.array(ids, np.int64),
                np.array(added, np.float32),
                np.array(before, np.int64),
            )

    def _take_past(self, taken: Seat) -> None:
        seat, past = taken.seat, np.array([*taken.prompt, *taken.output], np.int64)
        self.counts.drop(seat)
        self.history.drop(seat)
        self.words.pop(seat, None)
        if (self.penalties[seat] != (1, 0, 0)).any():
            count = np.zeros(self.vocabulary, np.int32)
            count[past[: len(taken.prompt)]] = 1
            np.add.at(count, past[len(taken.prompt) :], 2)
            self.counts.take(seat).copy_(self._up(count))
        words = [word for word in taken.sampling.bad_words if len(word) > 1]
        if words:
            self.words[seat] = _as_words(words)
            self.history.widen(len(past))
            self.history.take(seat)[: len(past)] = self._up(past)

    def plain(self, seats: Ints) -> bool:
        """Whether nothing but settings bears on their draws: no past, no mask, no bias, no ban."""
        held = (self.counts, self.history, self.masks)
        return not (
            any((shelf.slots[seats] >= 0).any() for shelf in held)
            or (self.edits and not self.edits.keys().isdisjoint(seats.tolist()))
        )

    # -- what they have seen ----------------------------------------------------------------------

    def feed(self, seats: Ints, tokens: Tensor, positions: Ints) -> None:
        """seats, tokens, positions [n]: a seat's past grows by tokens that it does not know yet."""
        looking = (self.counts.slots[seats] >= 0) | (self.history.slots[seats] >= 0)
        at = np.flatnonzero(looking & (positions >= self.known[seats]))
        if not len(at):
            return
        seats, positions, tokens = seats[at], positions[at], tokens[self._up(at)].long()
        np.maximum.at(self.known, seats, positions + 1)
        counted = np.flatnonzero((slots := self.counts.slots[seats]) >= 0)
        if len(counted):
            where = (self._up(slots[counted]), tokens[self._up(counted)])
            two = torch.full_like(where[0], 2, dtype=torch.int32)
            self.counts.rows.index_put_(where, two, accumulate=True)
        kept = np.flatnonzero((slots := self.history.slots[seats]) >= 0)
        if len(kept):
            self.history.widen(int(positions[kept].max()) + 1)
            where = (self._up(slots[kept]), self._up(positions[kept]))
            self.history.rows.index_put_(where, tokens[self._up(kept)])

    # -- what they choose -------------------------------------------------------------------------

    def sample(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """logits [m, vocabulary] f32, the seats' and positions [m] of what is drawn -> ids [m] i64;
        −1 where a row's logits are not numbers, or masks and bans leave it nothing.

        A seat may come several times, at several positions, if it does not look back.
        """
        logits = self.adjust(logits, seats, positions)
        bits = uniform_bits(self.keys[seats], positions)
        return sample(logits, self._up(bits), self._up(self.settings[seats]))

    def best(
        self, logits: Tensor, seats: Ints, positions: Ints, width: int
    ) -> tuple[Tensor, Tensor]:
        """-> log-probabilities [m, width] falling, ids [m, width]. For beams: as in transformers,
        penalties and masks come after the softmax, and nothing is normalised again."""
        scores = self.adjust(logits.log_softmax(-1), seats, positions)
        return top_logprobs(scores, width, normalise=False)[:2]

    def adjust(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """-> logits [m, vocabulary] after bias, bans, penalties and masks; the input is kept."""
        counts, masks = self.counts.slots[seats], self.masks.slots[seats]
        edited = self._edit(logits, seats, positions)
        rows = np.flatnonzero((counts >= 0) | (masks >= 0))
        if not len(rows):
            return edited
        at = self._up(rows)
        penalised = penalise(
            edited[at],
            self.counts.rows,
            self._up(counts[rows]),
            self._up(self.penalties[seats[rows]]),
            self.masks.rows,
            self._up(masks[rows]),
        )
        return edited.index_copy(0, at, penalised)

    def _edit(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """Bias and bans are added, all at once: a ban's −inf outweighs whatever else is added."""
        parts = []
        for row, seat in enumerate(seats.tolist()):
            if seat in self.edits:
                ids, added, before = self.edits[seat]
                values = np.where(positions[row] < before, added, np.float32(0))
                parts.append((np.full(len(ids), row), ids, values))
        if parts:
            where = [self._up(np.concatenate(column)) for column in zip(*parts, strict=True)]
            logits = logits.index_put((where[0], where[1]), where[2], accumulate=True)
        return self._ban_completions(logits, seats, positions)

    def _ban_completions(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """−inf for the last token of a bad word whose others were seen just before."""
        held = [
            (row, *self.words[seat])
            for row, seat in enumerate(seats.tolist())
            if seat in self.words
        ]
        if not held:
            return logits
        longest = max(beginnings.shape[1] for _, beginnings, _ in held)
        pads = [(0, longest - beginnings.shape[1]) for _, beginnings, _ in held]
        wanted = np.concatenate(
            [np.pad(h[1], ((0, 0), pad), constant_values=ANY) for h, pad in zip(held, pads)]
        )  # [words, longest], the nearest first
        rows = np.concatenate([np.full(len(ids), row) for row, _, ids in held])
        at = positions[rows][:, None] - 1 - np.arange(longest)
        wanted = np.where((at < 0) & (wanted != ANY), NEVER, wanted)
        self.history.widen(int(positions.max()))
        slots = self._up(self.history.slots[seats[rows]])
        seen = self.history.rows[slots[:, None], self._up(at.clip(min=0))]
        expected = self._up(wanted)
        banned = ((seen == expected) | (expected == ANY)).all(1)
        values = torch.where(banned, -torch.inf, 0.0)
        where = (self._up(rows), self._up(np.concatenate([ids for _, _, ids in held])))
        return logits.index_put(where, values, accumulate=True)

    def _up(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _as_words(words: list[tuple[int, ...]]) -> Words:
    longest = max(map(len, words)) - 1
    beginnings = [[*word[-2::-1], *[ANY] * (longest + 1 - len(word))] for word in words]
    return np.array(beginnings, np.int64), np.array([word[-1] for word in words], np.int64)


def _copy_held(held: dict[int, Held], sources: list[int], targets: list[int]) -> None:
    """Seat to seat, all read before any is written; what a source lacks, its target loses."""
    found = [held.get(seat) for seat in sources]
    for seat, one in zip(targets, found, strict=True):
        if one is None:
            held.pop(seat, None)
        else:
            held[seat] = one
