"""From tokens to text, one branch at a time: certain text only, and never a part of a stop string.

The decoder keeps back bytes that are not yet a character. What it gives runs through one
Knuth-Morris-Pratt automaton a stop string, a character at a time: a state is how many characters
of that string the text ends with, so the largest state is exactly what must be held back. The
string that is complete first wins (of two complete at once, the longer), wherever tokens were cut.
"""

from functools import lru_cache
from typing import Protocol, Self


class Decoder(Protocol):
    """What model.tokenizer.IncrementalDecoder does."""

    def push(self, token: int, /) -> str: ...
    def finish(self) -> str: ...
    def fork(self) -> Self: ...


class Silent:
    """The decoder of an engine that has no tokenizer."""

    def push(self, token: int, /) -> str:  # noqa: ARG002
        return ""

    def finish(self) -> str:
        return ""

    def fork(self) -> Self:
        return self


@lru_cache(maxsize=1024)
def _fallbacks(stop: str) -> tuple[int, ...]:
    """[len] how long a proper prefix of `stop` ends at each place: where a mismatch goes on."""
    table, state = [0], 0
    for letter in stop[1:]:
        while state and stop[state] != letter:
            state = table[state - 1]
        state += stop[state] == letter
        table.append(state)
    return tuple(table)


class Text:
    """What one branch has said."""

    __slots__ = ("_decoder", "_held", "_include", "_states", "_stops", "_tables", "stopped")

    def __init__(self, decoder: Decoder, stops: tuple[str, ...] = (), include: bool = False):
        self._decoder = decoder
        self._stops = tuple(stop for stop in stops if stop)
        self._tables = [_fallbacks(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include  # a stop string stays in the text
        self._held = ""
        self.stopped: str | None = None  # the stop string that was completed; then push no more

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        piece = self._decoder.push(token)
        return self._search(piece) if self._stops else piece

    def finish(self) -> str:
        """All that was held back: no more tokens come."""
        if self.stopped is not None:
            return ""
        rest = self._search(self._decoder.finish())
        held, self._held = self._held, ""
        return rest + held

    def fork(self) -> "Text":
        """The same branch so far, for another continuation."""
        twin = Text(self._decoder.fork(), self._stops, self._include)
        twin._states = list(self._states)
        twin._held, twin.stopped = self._held, self.stopped
        return twin

    def completes(self, token: int) -> str | None:
        """The stop string that this token would complete."""
        twin = self.fork()
        twin.push(token)
        return twin.stopped

    def _search(self, piece: str) -> str:
        text = self._held + piece
        for end, letter in enumerate(piece, len(self._held) + 1):
            found = self._step(letter)
            if found:
                self.stopped, self._held = found, ""
                return text[: end if self._include else end - len(found)]
        certain = len(text) - max(self._states, default=0)
        self._held = text[certain:]
        return text[:certain]

    def _step(self, letter: str) -> str:
        """Move every automaton on; the longest stop string that is complete now, or nothing."""
        found = ""
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != letter:
                state = self._tables[i][state - 1]
            state += stop[state] == letter
            if state == len(stop) and state > len(found):
                found = stop
            self._states[i] = state
        return found
