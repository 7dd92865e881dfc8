"""A byte-level BPE, trained from scratch, and written as an ordinary tokenizer.json.

A text is first cut into words by `PATTERN`; merges never cross a word. Training counts each
different word once, keeps the count of every pair and which words hold it, and after a merge
touches only those words: 4,000 merges over 10 MB of Python take seconds.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random

import regex

END = "<|endoftext|>"
# Cut where people pause when they type a prompt: a name keeps its dot or bracket ("self.",
# "range("), a digit stands alone (counting and sums), and a line break takes the indentation
# that follows. Two spaces and more stay together, so that one space by itself only ever means
# that a prompt ended there.
PATTERN = (
    r"[ \t][ \t]+"
    r"| ?[\p{L}_]+[.(]?"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}_]+(?:\n+ *)?"
    r"|\n+[ \t]*"
    r"|\s+"
)
WORD = regex.compile(PATTERN)
Pair = tuple[int, int]


def byte_letters() -> list[str]:
    """A printable letter for each byte, as GPT-2 chose them: the alphabet of tokenizer.json."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    rest = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


def train(texts: Iterable[str], vocabulary: int) -> list[Pair]:
    """The merges, first to last; token 256 + i is what merge i makes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    return _Training(counts).merges(vocabulary - 256 - 1)


class _Training:
    def __init__(self, counts: Counter[str]) -> None:
        self.words = [list(word.encode()) for word in counts]
        self.weights = list(counts.values())
        self.pairs: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, word in enumerate(self.words):
            self._count(index, word, 1)

    def merges(self, count: int) -> list[Pair]:
        """Always the most frequent pair; the smaller ids where two are as frequent."""
        queue = [(-n, pair) for pair, n in self.pairs.items()]
        heapq.heapify(queue)
        made: list[Pair] = []
        while queue and len(made) < count:
            n, pair = heapq.heappop(queue)
            if self.pairs[pair] != -n:  # counted anew since it was queued
                if self.pairs[pair] > 0:
                    heapq.heappush(queue, (-self.pairs[pair], pair))
                continue
            changed = self._merge(pair, 256 + len(made))
            made.append(pair)
            for other in changed:
                heapq.heappush(queue, (-self.pairs[other], other))
        return made

    def _merge(self, pair: Pair, new: int) -> set[Pair]:
        changed: set[Pair] = set()
        for index in self.where.pop(pair):
            word = self.words[index]
            self._count(index, word, -1)
            self.words[index] = merged = _replace(word, pair, new)
            self._count(index, merged, 1)
            changed.update(p for p in pairwise(merged) if new in p)
        self.pairs.pop(pair, None)
        return changed

    def _count(self, index: int, word: list[int], sign: int) -> None:
        for pair in pairwise(word):
            self.pairs[pair] += sign * self.weights[index]
            if sign > 0:
                self.where[pair].add(index)


def _replace(word: list[int], pair: Pair, new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


class Encoder:
    """Text → ids for training, where a word may be cut in two at random.

    At serving time a prompt may stop within a word that the corpus always showed whole. A model
    that met some words in two pieces carries on from there; one that did not is lost.
    """

    def __init__(self, merges: list[Pair]) -> None:
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.end = 256 + len(merges)
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str, cut: float = 0.0, random: Random | None = None) -> list[int]:
        ids: list[int] = []
        for word in WORD.findall(text):
            if cut and random and len(word) > 1 and random.random() < cut:
                space = word[0] == " " and random.random() < 0.75  # where most prompts stop
                at = 1 if space else random.randrange(1, len(word))
                ids += self._word(word[:at]) + self._word(word[at:])
            else:
                ids += self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        if (ids := self.known.get(word)) is None:
            ids = self.known[word] = self._merge(list(word.encode()))
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda p: self.ranks.get(p, len(self.ranks)))
            if pair not in self.ranks:
                break
            ids = _replace(ids, pair, 256 + self.ranks[pair])
        return ids


def save(merges: list[Pair], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, readable by everyone."""
    letters = byte_letters()
    tokens = list(letters)  # id = byte
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    special = {
        "id": len(tokens),
        "content": END,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "special": True,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [cut, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            **dict.fromkeys(
                ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
            ),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)} | {END: len(tokens)},
            "merges": [[tokens[left], tokens[right]] for left, right in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    _write(folder / "tokenizer.json", document)
    _write(folder / "tokenizer_config.json", settings)


def load(folder: Path) -> list[Pair]:
    """The merges back from a tokenizer.json that `save` wrote."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def _write(path: Path, document: object) -> None:
    text = json.dumps(document, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
