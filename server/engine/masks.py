"""What may follow a branch's tokens, where that depends on the tokens: a state that each one moves.

A mask lives where its branch does and goes its ways: beams that part fork it, preemption keeps it,
and a guess is looked at from where the guesses before it lead. Nothing of it crosses to another
process. What crosses is the request, plain data, from which the engine makes the mask.

The mask of a step is not known before the token of the step before it. So a branch that has one is
never launched a step ahead.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from functools import reduce
from typing import Protocol, TypeAlias

import numpy as np

from model.batch import Ints
from model.sampling import packed
from server.engine.request import Request


class Mask(Protocol):
    """It must not raise, and it must be quick: the whole batch waits for it."""

    def allowed(self) -> Ints | None:
        """The ids that may come next, as bits [⌈vocabulary / 32⌉], not to be written to; None:
        all. None at all fails a request that draws; beams then answer as they stand."""
        ...

    def push(self, token: int) -> None:
        """An allowed token came, and the branch goes on."""
        ...

    def fork(self) -> "Mask":
        """One that goes on from here by itself."""
        ...


Making: TypeAlias = Callable[[Request], Mask | None]  # at the end of the request's prompt


def boundless(request: Request) -> None:
    """What an engine adds that knows of no masks but the request's bad words."""


def begin(request: Request, more: Making, vocabulary: int) -> Mask | None:
    """All that restricts a request's tokens by the tokens before them."""
    masks = [mask for mask in (_bad_words(request, vocabulary), more(request)) if mask is not None]
    return masks[0] if len(masks) == 1 else Every(masks) if masks else None


def follow(mask: Mask, guess: Sequence[int], stops: Container[int]) -> list[Ints | None]:
    """What may come, and what may come after each of the guesses, until one is not allowed, or
    would be the last: from there on nothing can come true."""
    mask = mask.fork() if guess else mask
    found = [mask.allowed()]
    for token in guess:
        words = found[-1]
        if token in stops or not (words is None or words[token >> 5] >> (token & 31) & 1):
            break
        mask.push(token)
        found.append(mask.allowed())
    return found


class Every:
    """Several at once."""

    def __init__(self, masks: Iterable[Mask]) -> None:
        self._masks = list(masks)

    def allowed(self) -> Ints | None:
        found = [bits for mask in self._masks if (bits := mask.allowed()) is not None]
        return reduce(np.bitwise_and, found) if found else None

    def push(self, token: int) -> None:
        for mask in self._masks:
            mask.push(token)

    def fork(self) -> "Every":
        return Every(mask.fork() for mask in self._masks)


class BadWords:
    """No token that would complete one of these sequences, each of two tokens or more."""

    def __init__(self, words: Iterable[Sequence[int]], vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._ends: dict[tuple[int, ...], list[int]] = {}  # all but the last token -> the last
        for word in words:
            self._ends.setdefault(tuple(word[:-1]), []).append(word[-1])
        self._lengths = sorted({len(beginning) for beginning in self._ends})
        self._past: tuple[int, ...] = ()

    def allowed(self) -> Ints | None:
        past, ends = self._past, self._ends
        banned = [id for length in self._lengths for id in ends.get(past[-length:], ())]
        if not banned:
            return None
        truths = np.ones(self._vocabulary, bool)
        truths[banned] = False
        return packed(truths)

    def push(self, token: int) -> None:
        self._past = (*self._past, token)[-self._lengths[-1] :]

    def fork(self) -> "BadWords":
        other = object.__new__(BadWords)
        other.__dict__ = dict(self.__dict__)  # only the past changes, and never in place
        return other


def _bad_words(request: Request, vocabulary: int) -> BadWords | None:
    """Those of one token are banned for good, and the model does that by itself."""
    words = [word for word in request.sampling.bad_words if len(word) > 1]
    if words and not vocabulary:
        raise ValueError("vocabulary is 0 in the engine's options: it must be known to ban words")
    words = [word for word in words if max(word) < vocabulary]  # others cannot be said anyway
    if not words:
        return None
    mask = BadWords(words, vocabulary)
    for token in request.prompt[-max(map(len, words)) :]:
        mask.push(token)
    return mask
