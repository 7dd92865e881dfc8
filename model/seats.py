"""Where branches sit between steps: what their draws depend on, for many of them as tensors.

What a draw needs is small and known to the host (parameters, positions, random bits), so it lives
there and goes up with each step; only what grows by tokens that the host may not know yet lives
on the device, and only for the seats that ask for it:

    counts   [slots, vocabulary]  2 · how often a token was drawn, + 1 if it is in the prompt
    masks    [slots, words]       the bits of allowed ids

What changes with each token in ways of its own is masked by who makes the batch, see `Masks`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.penalties import penalise
from kernels.sampling import branch_key, sample, uniform_bits
from kernels.topk import log_softmax, top_logprobs
from model.batch import Seat
from model.sampling import packed
from model.shelf import Shelf

Ints = npt.NDArray[np.integer]
Edits = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]
# ids, what is added to their logits, and before which position: bias, and −inf for bans

Held = TypeVar("Held")

EVER = np.iinfo(np.int64).max


class Masks(NamedTuple):
    """What a step may draw, on top of what the seats say."""

    words: Tensor  # [masks, ⌈vocabulary / 32⌉] i32, on the device
    rows: Ints  # [m] the mask of each row of logits; −1: none


class Seats:
    """What `Batch.taken` put into every seat, and what became of it since."""

    def __init__(self, capacity: int, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.vocabulary, self.device = vocabulary, torch.device(device)
        self.settings = np.zeros((capacity, 5), np.float32)  # see kernels/sampling.py; all greedy
        self.penalties = np.tile(np.array([1, 0, 0], np.float32), (capacity, 1))
        self.keys = np.zeros(capacity, np.uint64)
        self.known = np.zeros(capacity, np.int64)  # positions below have been counted
        self.edits: dict[int, Edits] = {}
        self.counts = Shelf(capacity, vocabulary, torch.int32, self.device)
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
        self._restrict(seat, sampling.allowed)

    def _restrict(self, seat: int, allowed: Sequence[int]) -> None:
        """Only these ids; none named: every id."""
        if not allowed:
            self.masks.drop(seat)
            return
        truths = np.zeros(self.vocabulary, bool)
        truths[list(allowed)] = True
        self.masks.take(seat).copy_(self._up(packed(truths)))

    def fork(self, pairs: Ints) -> None:
        """pairs [forks, 2] from, to: `to` continues what `from` has seen, with draws of its own."""
        sources, targets = pairs[:, 0].tolist(), pairs[:, 1].tolist()
        for table in (self.settings, self.penalties, self.known):
            table[targets] = table[sources]
        _copy_held(self.edits, sources, targets)
        for shelf in (self.counts, self.masks):
            shelf.copy(sources, targets)

    def _take_edits(self, taken: Seat) -> None:
        sampling = taken.sampling
        self.edits.pop(taken.seat, None)
        if not (sampling.logit_bias or sampling.bad_words or sampling.min_tokens):
            return
        bans = [w[0] for w in sampling.bad_words if len(w) == 1 and w[0] < self.vocabulary]
        stops = list(sampling.stops) if sampling.min_tokens else []
        ids = [*sampling.logit_bias, *bans, *stops]
        added = [*sampling.logit_bias.values(), *[-np.inf] * (len(bans) + len(stops))]
        before = [EVER] * (len(ids) - len(stops)) + [taken.start + sampling.min_tokens] * len(stops)
        if ids:
            self.edits[taken.seat] = (
                np.array(ids, np.int64),
                np.array(added, np.float32),
                np.array(before, np.int64),
            )

    def _take_past(self, taken: Seat) -> None:
        seat = taken.seat
        self.counts.drop(seat)
        if taken.sampling.looks_back:
            past = np.array([*taken.prompt, *taken.output], np.int64)
            count = np.zeros(self.vocabulary, np.int32)
            count[past[: len(taken.prompt)]] = 1
            np.add.at(count, past[len(taken.prompt) :], 2)
            self.counts.take(seat).copy_(self._up(count))

    def plain(self, seats: Ints) -> bool:
        """Whether nothing but settings bears on their draws: no past, no mask, no bias, no ban."""
        shelves = self.counts, self.masks
        return not (
            any(not shelf.bare and (shelf.slots[seats] >= 0).any() for shelf in shelves)
            or (self.edits and not self.edits.keys().isdisjoint(seats.tolist()))
        )

    # -- what they have seen ----------------------------------------------------------------------

    def feed(self, seats: Ints, tokens: Tensor, positions: Ints) -> None:
        """seats, tokens, positions [n]: a seat's past grows by tokens that it does not know yet."""
        if self.counts.bare:
            return
        slots = self.counts.slots[seats]
        at = np.flatnonzero((slots >= 0) & (positions >= self.known[seats]))
        if not len(at):
            return
        np.maximum.at(self.known, seats[at], positions[at] + 1)
        where = (self._up(slots[at]), tokens[self._up(at)].long())
        two = torch.full_like(where[0], 2, dtype=torch.int32)
        self.counts.rows.index_put_(where, two, accumulate=True)

    # -- what they choose -------------------------------------------------------------------------

    def sample(
        self, logits: Tensor, seats: Ints, positions: Ints, masks: Masks | None = None
    ) -> Tensor:
        """logits [m, vocabulary] f32, the seats' and positions [m] of what is drawn -> ids [m] i64;
        −1 where a row's logits are not numbers, or masks and bans leave it nothing.

        A seat may come several times, at several positions, if it does not look back.
        """
        if masks is not None or not self.plain(seats):
            logits = self.adjust(logits, seats, positions, masks)
        settings = self.settings[seats]
        chance = settings[:, 0].any()  # a greedy choice asks for none
        bits = (
            uniform_bits(self.keys[seats], positions) if chance else np.zeros(len(seats), np.int64)
        )
        return sample(logits, self._up(bits), self._up(settings))

    def best(
        self,
        logits: Tensor,
        seats: Ints,
        positions: Ints,
        width: int,
        masks: Masks | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> log-probabilities [m, width] falling, ids [m, width]. For beams: as in transformers,
        penalties and masks come after the softmax, and nothing is normalised again."""
        scores = self.adjust(log_softmax(logits), seats, positions, masks)
        return top_logprobs(scores, width, normalise=False)[:2]

    def adjust(
        self, logits: Tensor, seats: Ints, positions: Ints, masks: Masks | None = None
    ) -> Tensor:
        """-> logits [m, vocabulary] after bias, bans, penalties and masks; the input is kept."""
        logits = self._edit(logits, seats, positions)
        counts = self.counts.slots[seats]
        logits = self._penalise(
            logits, seats, counts, Masks(self.masks.rows, self.masks.slots[seats])
        )
        return (
            logits
            if masks is None
            else self._penalise(logits, seats, np.full_like(counts, -1), masks)
        )

    def _penalise(self, logits: Tensor, seats: Ints, counts: Ints, masks: Masks) -> Tensor:
        """counts [m]: the slot of each row's past; −1: none. Rows without either are not read."""
        rows = np.flatnonzero((counts >= 0) | (masks.rows >= 0))
        if not len(rows):
            return logits
        at = self._up(rows)
        penalised = penalise(
            logits[at],
            self.counts.rows,
            self._up(counts[rows]),
            self._up(self.penalties[seats[rows]]),
            masks.words,
            self._up(masks.rows[rows]),
        )
        return penalised if len(rows) == len(logits) else logits.index_copy(0, at, penalised)

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
        return logits

    def _up(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _copy_held(held: dict[int, Held], sources: list[int], targets: list[int]) -> None:
    """Seat to seat, all read before any is written; what a source lacks, its target loses."""
    found = [held.get(seat) for seat in sources]
    for seat, one in zip(targets, found, strict=True):
        if one is None:
            held.pop(seat, None)
        else:
            held[seat] = one
