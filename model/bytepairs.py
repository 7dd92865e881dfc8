"""Byte-level BPE by tiktoken, where it is proved to give the ids of the tokenizers library.

Two things must be proved. First, that a text falls into the same words: the pattern may use only
what both regex engines read alike, and must match every character, for tiktoken drops the rest.

Second, that a word falls into the same tokens. The library merges the listed *pair* of lowest
rank; tiktoken any two neighbours that make a token *together*, lowest rank first. Take neighbours
x, y that together spell a token z. No merge has crossed their outer ends, so what happened between
them is what happens to z alone, and z alone passes through [x, y]. If z alone ends as [z], then
(x, y) is the one listed pair that makes it, and both merge it; if z alone ends otherwise, the
library never makes z, and tiktoken must not know it. So it is enough to tokenize every token alone.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import tiktoken
from tokenizers.models import BPE

from model.spelling import LETTERS
from model.tokenfiles import Json, flatten

# ── words ─────────────────────────────────────────────────────────────────────────────────────

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's pattern on what is between them (StarCoder, SmolLM).
DIGITS = rf"\p{{N}}|{CONTRACTIONS}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"

# What Oniguruma and Rust read alike; a test compares them on every character there is.
_ONE = r"\\p\{(?:[LMNPSZ]|L[ulmot])\}|\\[rnt]"
_ATOM = rf"(?:{_ONE}|\\[sS]|\[\^?(?:{_ONE}|\\s|[\w .,(){{}}'/])+\]|[\w '/])"
_SOLID = rf"{_ATOM}(?:\+|\{{(?:1,)?[1-9]\}})?(?![?*+{{])"
_TERM = rf"(?:{_SOLID}|{_ATOM}[?*](?![?*+{{]))"
_GROUP = rf"(?:\(\?i:{re.escape(CONTRACTIONS)}\)|\(\?:{_SOLID}{_TERM}*\))"
_BLANKS = r"(\\s|\[(?: |\\[srnt])+\])\+(\(\?!(?:\\S|\[\^\\s\\p\{N\}\])\))"
_PART = re.compile(rf"{_BLANKS}(?=\||$)|(?:{_TERM}|{_GROUP}\??)+", re.ASCII)
_EMPTY = re.compile(rf"(?:{_ATOM}[?*]|{_GROUP}\?)+", re.ASCII)  # what may match nothing at all


def cut_of(pre_tokenizer: Json | None) -> tuple[str, bool] | None:
    """The pattern by which a text falls into words, and whether a space is put in front."""
    steps = flatten(pre_tokenizer, "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel":
        return None
    space, regex = steps[-1]["add_prefix_space"], steps[-1].get("use_regex", True)
    if len(steps) == 1 and regex:
        return GPT2, space
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and regex and not space:
        return DIGITS, False
    if kinds == ["Split", "ByteLevel"] and not regex and not space:
        how = steps[0]["behavior"], steps[0].get("invert", False)
        pattern = steps[0]["pattern"].get("Regex")
        if pattern and how in (("Isolated", False), ("Removed", True)):
            return pattern, False
    return None


@cache
def translate(pattern: str) -> str | None:
    """The same for tiktoken, or nothing where that is not certain."""
    parts = [found[0] for found in _PART.finditer(pattern[:2000])]
    if "|".join(parts) != pattern or any(map(_EMPTY.fullmatch, parts)):
        return None
    certain = "|".join(part for part in parts if "(?!" not in part)
    if not certain or not _covers(certain, pattern):
        return None
    return "|".join(_unwind(part) for part in parts)


def _unwind(part: str) -> str:
    r"""`\s+(?!\S)` leaves the last blank of a run to the word behind it. Found by going one back,
    which makes Rust's engine remember each step of a run: 1 MB of blanks is an overflow. So: all of
    the run where that may stay, else blanks that another follows, 512 a step."""
    found = re.fullmatch(_BLANKS, part)
    if not found:
        return part
    x, ahead = found.groups()
    return rf"{x}++{ahead}|(?:{x}{{512}}(?={x}))+(?:{x}(?={x}))*|(?:{x}(?={x}))+"


def _covers(pattern: str, literals: str) -> bool:
    """A pattern is made of categories, blanks and its own letters: one of each sort is enough."""
    sorts = {(unicodedata.category(c), c.isspace()): c for c in map(chr, range(0xD800))}
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    core = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=bytes_only, special_tokens={})
    probes = {*sorts.values(), *literals, *"\r\n\t"}
    return all(bytes(core.encode_ordinary(c)) == c.encode() for c in probes)


# ── tokens ────────────────────────────────────────────────────────────────────────────────────


def ranks_of(model: Json, special: set[str]) -> dict[bytes, int] | None:
    """Token → id, in the order of merges, without those that the library never makes."""
    vocabulary: dict[str, int] = model["vocab"]
    if not LETTERS.keys() <= vocabulary.keys() or len(set(vocabulary.values())) < len(vocabulary):
        return None
    pairs = [_pair(merge) for merge in model["merges"]]
    made = _in_order(pairs)
    if made is None:
        return None
    alone = BPE(vocab=vocabulary, merges=pairs).tokenize
    ends = {z: [found.id for found in alone(z)] for z in vocabulary if LETTERS.keys() >= set(z)}
    order = [*LETTERS, *(z for z in made if z in ends and ends[z] == [vocabulary[z]])]
    if model.get("ignore_merges"):  # a word that is a token is that token, merges or not
        rest = [z for z in ends if z and ends[z] != [vocabulary[z]] and z not in special]
        if any(len(ends[z]) == 2 for z in rest):
            return None
        order += rest
    return {bytes(LETTERS[letter] for letter in z): vocabulary[z] for z in order}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _in_order(pairs: list[tuple[str, str]]) -> dict[str, int] | None:
    """Token → its last merge; the pairs that make one token must be next to each other, so that it
    does not matter which of them does."""
    last: dict[str, int] = {}
    for i, (left, right) in enumerate(pairs):
        if not left or not right or last.get(left + right, i - 1) != i - 1:
            return None
        last[left + right] = i
    return last


class BytePairs:
    """Text between added tokens → ids. Any number of threads may encode at once."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], space: bool) -> None:
        ids = list(ranks.values())
        ordered = ids[256:] == sorted(ids[256:])  # then tiktoken can take ids for ranks
        self._ids = None if ordered else ids
        ranks = ranks if ordered else {token: rank for rank, token in enumerate(ranks)}
        core = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._encode: Callable[[str], list[int]] = core.encode_ordinary
        self._space = space

    @staticmethod
    def prove(document: Json, special: set[str]) -> "BytePairs | None":
        """Nothing, where equality with the tokenizers library cannot be proved."""
        model: Mapping[str, Any] = document["model"]
        cut = cut_of(document.get("pre_tokenizer"))
        affixes = "continuing_subword_prefix", "end_of_word_suffix"
        if model.get("type", "BPE") != "BPE" or "merges" not in model or cut is None:
            return None
        pattern = None if any(model.get(name) for name in affixes) else translate(cut[0])
        ranks = ranks_of(model, special) if pattern else None
        return BytePairs(pattern, ranks, cut[1]) if pattern and ranks else None

    def encode(self, text: str) -> list[int]:
        if self._space and not text.startswith(" "):
            text = " " + text
        found = self._encode(text)
        return found if self._ids is None else list(map(self._ids.__getitem__, found))
