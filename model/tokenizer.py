"""Text ↔ ids: tiktoken for byte-level BPE, the tokenizers library for every other kind.

Whichever encodes, the ids are those of the tokenizers library. Encoding is a pure function on what
was loaded once: threads share a Tokenizer without a lock.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from model.bytepairs import BytePairs
from model.spelling import Chain, IncrementalDecoder, Speech, spelling_of
from model.tokenfiles import Json, TokenFiles, TokenizerError, flatten, read

# The library's pool of threads would help a batch, and we encode one text a call; without it a
# call runs where it was made, and still lets go of the interpreter's lock.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HOLE = "\ufdd0"  # stands for text between added tokens; no token of a model is spelled like it
HOLE_ID = 0xFFFF_FFFF
TINY = {"type": "WordLevel", "vocab": {HOLE: HOLE_ID}, "unk_token": HOLE}
LEADS = "\nx0|).中"
FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # normalisers that leave ASCII as it is


class TextError(ValueError):
    """A text that cannot be encoded; whoever sent it can mend it."""


class Engine(Protocol):
    """One of two ways to encode."""

    def encode(self, text: str, special: bool) -> list[int]: ...


class Tokenizer:
    """The words of one model."""

    def __init__(self, files: TokenFiles) -> None:
        self.names = files.names  # "eos_token" → "</s>" …: what chat templates are given
        self.ends = files.eos  # ids that end a text, the tokenizer's own first
        self.eos, self.bos = next(iter(files.eos), None), files.bos
        self.special = {t["content"]: t["id"] for t in files.added if t["special"]}
        parts = _build({**files.document, "model": TINY, "added_tokens": []})
        added = {token["id"]: _shown(token, parts) for token in files.added}
        tokens = {i: token for token, i in files.vocabulary.items()} | added
        self.vocabulary = max(tokens) + 1  # every id is below
        self._before, self._after = _around(parts)
        self._cutter = Cutter(files.added)
        self._engine = _engine(files, parts, self._cutter)
        spelling = spelling_of(files.document.get("decoder"), added.values(), _chain)
        self._everything = Speech(tokens, spelling, ())
        self._plain = Speech(tokens, spelling, frozenset(self.special.values()))

    @staticmethod
    def load(folder: Path | str) -> "Tokenizer":
        with _told_of(folder):
            tokenizer = Tokenizer(read(Path(folder)))
            tokenizer.encode("a b")  # some faults show only when it runs
            return tokenizer

    @property
    def engine(self) -> str:
        """tiktoken, or tokenizers where the former is not proved to be equal."""
        return "tiktoken" if isinstance(self._engine, Proved) else "tokenizers"

    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]:
        """Special tokens that are written in the text are plain text, unless `special`. `bos`: with
        what this tokenizer puts around a text, most often one token before it or nothing."""
        if not text.isascii():
            _refuse_surrogates(text)
        try:
            ids = self._engine.encode(text, special)
        except BaseException as error:
            if not _panicked(error):
                raise
            raise TextError(f"the text cannot be cut into words: {error}") from None
        return [*self._before, *ids, *self._after] if bos else ids

    def encode_rest(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of what comes after other text: no space is put in front of it. Kinds that put
        one there encode it behind a character, which must then be a token of its own."""
        for ahead in LEADS if self._puts_space else ():
            start = self.encode(ahead, bos=False)
            ids = self.encode(ahead + text, special=special, bos=False)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return self.encode(text, special=special, bos=False)

    @cached_property
    def _puts_space(self) -> bool:
        return b"".join(map(self.token_bytes, self.encode("x", bos=False))).startswith(b" ")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        decoder = self.decoder(skip_special)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def decoder(self, skip_special: bool = True, *, continuing: bool = False) -> IncrementalDecoder:
        """`continuing`: the ids go on from a text, so the space before their first word counts."""
        return IncrementalDecoder(self._plain if skip_special else self._everything, continuing)

    def token_bytes(self, id: int) -> bytes:
        """What a token says in the middle of a text; nothing for an id that no token has."""
        return self._everything.middle(id)

    def cut(self, text: str) -> list[tuple[str, int | None]]:
        """The text in parts: added tokens, special ones too, with their id; and what is between."""
        return self._cutter.cut(text, special=True)


@contextmanager
def _told_of(folder: Path | str) -> Iterator[None]:
    """Whatever a stranger's files bring about is one sentence. The library's panics are no
    Exceptions, and its own errors have no class of their own."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _panicked(error):
            raise
        raise TokenizerError(f"the tokenizer in {folder} cannot be used: {error!r}") from error


def _panicked(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"character {error.start} is \\u{ord(text[error.start]):04x}, half of a surrogate pair;"
            " a text must be valid Unicode"
        ) from None


# ── parts of the library ──────────────────────────────────────────────────────────────────────


def _build(document: Json) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def _chain(steps: list[Json]) -> Chain:
    chain: Chain = _build(
        {"model": TINY, "decoder": {"type": "Sequence", "decoders": steps}}
    ).decoder
    return chain


def _around(parts: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after those of a text."""
    tiny = _build({"model": TINY})
    if parts.post_processor is not None:
        tiny.post_processor = parts.post_processor
    ids = tiny.encode(HOLE).ids
    if ids.count(HOLE_ID) != 1:
        raise TokenizerError("tokenizer.json: the post-processor does not keep the text")
    place = ids.index(HOLE_ID)
    return ids[:place], ids[place + 1 :]


def _shown(token: dict[str, Any], parts: tokenizers.Tokenizer) -> str:
    """An added token that is searched for after normalisation reads as it was found."""
    content: str = token["content"]
    if token["normalized"] and parts.normalizer is not None:
        content = parts.normalizer.normalize_str(content)
    return content


class Cutter:
    """Finds added tokens by the library's own search, in a vocabulary that has nothing else."""

    def __init__(self, added: list[dict[str, Any]]) -> None:
        self._every = _finder(added)
        places = (self._every.token_to_id(token["content"]) for token in added)
        self._ids = dict(zip(places, (token["id"] for token in added)))
        self._common = _finder(added) if any(not token["special"] for token in added) else None
        if self._common is not None:
            self._common.encode_special_tokens = True  # that is, as text

    def cut(self, text: str, special: bool) -> list[tuple[str, int | None]]:
        """Parts and ids, None for what is between added tokens; special ones only if `special`."""
        finder = self._every if special else self._common
        if not text:
            return []
        if finder is None or finder.encode_batch_fast([text])[0].ids == [HOLE_ID]:
            return [(text, None)]  # the usual case: places would cost fifteen times as much
        found = finder.encode_batch([text])[0]
        return [
            (text[start:end], self._ids.get(place))
            for place, (start, end) in zip(found.ids, found.offsets)
        ]


def _finder(added: list[dict[str, Any]]) -> tokenizers.Tokenizer:
    finder = _build({"model": TINY})
    flags = ({k: v for k, v in token.items() if k != "id"} for token in added)
    finder.add_tokens([tokenizers.AddedToken(**token) for token in flags])
    return finder


# ── two ways to encode ────────────────────────────────────────────────────────────────────────


def _engine(files: TokenFiles, parts: tokenizers.Tokenizer, cutter: Cutter) -> Engine:
    special = {token["content"] for token in files.added if token["special"]}
    # Added tokens that are searched for after normalisation are the library's business.
    late = parts.normalizer is not None and any(token["normalized"] for token in files.added)
    pairs = None if late else BytePairs.prove(files.document, special)
    return Proved(pairs, files, parts, cutter) if pairs else Library(files)


class Proved:
    """Added tokens and normalisation by parts of the library, words and merges by tiktoken."""

    def __init__(
        self, pairs: BytePairs, files: TokenFiles, parts: tokenizers.Tokenizer, cutter: Cutter
    ) -> None:
        self._pairs, self._cutter = pairs, cutter
        kinds = [step["type"] for step in flatten(files.document.get("normalizer"), "normalizers")]
        self._normalize = parts.normalizer.normalize_str if kinds else str
        self._skip_ascii = all(kind in FORMS for kind in kinds)

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for part, token in self._cutter.cut(text, special):
            if token is not None:
                ids.append(token)
            elif self._skip_ascii and part.isascii():
                ids += self._pairs.encode(part)
            else:
                ids += self._pairs.encode(self._normalize(part))
        return ids


class Library:
    """The tokenizers library, all of it."""

    def __init__(self, files: TokenFiles) -> None:
        self._all = _build(files.document)
        self._special = {token["id"] for token in files.added if token["special"]}
        self._letters = _letters(files)

    @cached_property
    def _text_only(self) -> tokenizers.Tokenizer:
        """Takes special tokens for text: needed once somebody writes one."""
        twin = tokenizers.Tokenizer.from_str(self._all.to_str())
        twin.encode_special_tokens = True
        return twin

    def encode(self, text: str, special: bool) -> list[int]:
        ids = _run(self._all, text)
        if special or self._special.isdisjoint(ids):
            return ids
        ids = _run(self._text_only, text)  # and Unigram may still know the token as a word
        return [letter for i in ids for letter in self._letters.get(i, (i,))]


def _letters(files: TokenFiles) -> dict[int, list[int]]:
    """Each special token, letter by letter; the unknown token is what a text may well become."""
    model = files.document["model"]
    unknown = model.get("unk_id", files.vocabulary.get(model.get("unk_token") or ""))
    return {
        token["id"]: [
            i
            for i in (files.vocabulary.get(letter, unknown) for letter in token["content"])
            if i is not None
        ]
        for token in files.added
        if token["special"] and token["id"] != unknown
    }


def _run(engine: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = engine.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids
