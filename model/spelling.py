"""What ids say, as bytes; and the incremental decoder, which turns them into text one by one.

Every decoder that we take is the same machine: a token has its bytes in the middle of a text,
perhaps others at the beginning, and spaces may be taken off in front. So a character that is cut
into several tokens needs no look back at them, only the one to three bytes that it has so far.
"""

import re
from codecs import utf_8_decode
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Protocol

from model.tokenfiles import Json, TokenizerError, flatten

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ALONE = ("Replace", "WordPiece", "Metaspace", "Strip")  # they see one token, and if it is the first
JOINED: tuple[list[str], ...] = (
    [],
    ["Fuse"],
    ["ByteFallback"],
    ["ByteFallback", "Fuse"],
)  # what may come after them


def _byte_letters() -> dict[str, int]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


LETTERS = _byte_letters()  # GPT-2's alphabet: a printable letter for each byte


class Spelling(Protocol):
    """How the tokens of one kind of tokenizer become bytes."""

    strip: int  # so many spaces are taken off the front of the whole text
    by_place: bool  # the first token is spelled in its own way

    def first(self, token: str, /) -> bytes: ...
    def middle(self, token: str, /) -> bytes: ...


class Letters:
    """Byte-level: a letter is a byte. Added tokens mean themselves, whatever their letters."""

    strip, by_place = 0, False

    def __init__(self, added: Collection[str]) -> None:
        self._added = frozenset(added)

    def middle(self, token: str) -> bytes:
        if token in self._added or not LETTERS.keys() >= set(token):
            return token.encode()
        return bytes([LETTERS[letter] for letter in token])

    first = middle


class Apart:
    """No decoder at all: the library puts spaces between tokens."""

    strip, by_place = 0, True

    def first(self, token: str) -> bytes:
        return token.encode()

    def middle(self, token: str) -> bytes:
        return b" " + token.encode()


class Chain(Protocol):
    """A decoder of the tokenizers library."""

    def decode(self, tokens: list[str], /) -> str: ...


class Chained:
    """SentencePiece and WordPiece kinds: the library's own steps say how a token is spelled."""

    def __init__(self, steps: list[Json], build: Callable[[list[Json]], Chain]) -> None:
        kinds = [step["type"] for step in steps]
        alone = next((i for i, kind in enumerate(kinds) if kind not in ALONE), len(kinds))
        strips = steps[alone:][len([kind for kind in kinds[alone:] if kind != "Strip"]) :]
        joined = kinds[alone : len(kinds) - len(strips)]
        if joined not in JOINED or (strips and "Fuse" not in joined):
            raise TokenizerError(f"tokenizer.json: decoder {' + '.join(kinds)} is not supported")
        self.strip = sum(_leading(step) for step in strips)
        self.by_place = "WordPiece" in kinds or "Metaspace" in kinds
        self._has_bytes = "ByteFallback" in joined
        self._chain = build(steps[:alone])
        self._before = len(self._chain.decode(["a"]))

    def first(self, token: str) -> bytes:
        return self._byte(token) or self._chain.decode([token]).encode()

    def middle(self, token: str) -> bytes:
        return self._byte(token) or self._chain.decode(["a", token])[self._before :].encode()

    def _byte(self, token: str) -> bytes:
        found = BYTE.fullmatch(token) if self._has_bytes else None
        return bytes.fromhex(found[1]) if found else b""


def _leading(step: Json) -> int:
    if step["content"] != " " or step["stop"]:
        raise TokenizerError(f"tokenizer.json: decoder {dict(step)} is not supported")
    return int(step["start"])


def spelling_of(
    decoder: Json | None, added: Collection[str], build: Callable[[list[Json]], Chain]
) -> Spelling:
    """`build` makes the library's decoder of some steps."""
    steps = flatten(decoder, "decoders")
    if not steps:
        return Apart()
    if [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]:
        return Letters(added)
    return Chained(steps, build)


class Speech:
    """What every id says; ids that are silent, or that nobody has, say nothing."""

    def __init__(
        self, tokens: Mapping[int, str], spelling: Spelling, silent: Collection[int]
    ) -> None:
        self._tokens = tokens
        self.spelling = spelling
        self._silent = silent
        self._said: dict[int, bytes] = {}  # filled when first needed: most ids never are
        self.whole: dict[int, str] = {}  # ids whose bytes are whole characters

    def middle(self, token: int) -> bytes:
        said = self._said.get(token)
        if said is None:
            if not self.speaks(token):
                return b""
            said = self._said[token] = self.spelling.middle(self._tokens[token])
            with suppress(UnicodeDecodeError):
                self.whole[token] = said.decode()
        return said

    def first(self, token: int) -> bytes:
        return self.spelling.first(self._tokens[token]) if self.speaks(token) else b""

    def speaks(self, token: int) -> bool:
        return token in self._tokens and token not in self._silent


_NOTHING: Mapping[int, str] = {}


class IncrementalDecoder:
    """One branch's text: the joined deltas are `Tokenizer.decode` of all ids, whatever they are."""

    __slots__ = ("_first", "_held", "_speech", "_strip", "_whole")

    def __init__(self, speech: Speech, continuing: bool = False) -> None:
        """`continuing`: text stands before this one, so that its leading space counts."""
        self._speech = speech
        self._held = b""  # the beginning of a character
        self._first = speech.spelling.by_place and not continuing
        self._strip = 0 if continuing else speech.spelling.strip
        self._whole = _NOTHING if self._first or self._strip else speech.whole

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if not self._held:
            text = self._whole.get(token)
            if text is not None:
                return text
        return self._join(token)

    def finish(self) -> str:
        """What was held: a character that never came to its end."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")

    def fork(self) -> "IncrementalDecoder":
        """The same text so far, for another continuation."""
        twin = IncrementalDecoder.__new__(IncrementalDecoder)
        twin._speech, twin._held, twin._whole = self._speech, self._held, self._whole
        twin._first, twin._strip = self._first, self._strip
        return twin

    def _join(self, token: int) -> str:
        started = self._whole is not _NOTHING
        data = self._held + (self._speech.middle(token) if started else self._begin(token))
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def _begin(self, token: int) -> bytes:
        """Until the first thing is said."""
        said = self._speech.first(token) if self._first else self._speech.middle(token)
        self._first = self._first and not self._speech.speaks(token)
        if self._strip and said:
            spaces = min(len(said) - len(said.lstrip(b" ")), self._strip)
            said = said[spaces:]
            self._strip = 0 if said else self._strip - spaces
        if not self._first and not self._strip:
            self._whole = self._speech.whole
        return said
