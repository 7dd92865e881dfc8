"""Ids and text against the tokenizers library and transformers, on text that breaks tokenizers."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from model.bytepairs import BytePairs, ranks_of, translate
from model.spelling import LETTERS
from model.tokenizer import TextError, Tokenizer
from tests.model import words

Maker = Callable[[], tokenizers.Tokenizer]


class Pair:
    """Ours, and the library's, of the same file."""

    def __init__(self, make: Maker, folder: Path) -> None:
        made = make()
        self.ours = Tokenizer.load(words.save(made, folder))
        self.plain, self.special = made, tokenizers.Tokenizer.from_str(made.to_str())
        self.plain.encode_special_tokens = True
        self.byte_level = make in words.PROVED + words.UNPROVED
        # Unigram knows special tokens as words, and gives their ids to plain text. We do not.
        self.leaks = make in (words.unigram, words.unigram_bytes)

    def expected(self, text: str, special: bool, bos: bool) -> list[int]:
        engine = self.special if special else self.plain
        ids: list[int] = engine.encode(text, add_special_tokens=bos).ids
        return ids

    def text_of(self, ids: list[int], skip: bool) -> str:
        text: str = self.plain.decode(ids, skip_special_tokens=skip)
        return text

    def id_of(self, token: str) -> int:
        found = self.plain.token_to_id(token)
        assert isinstance(found, int)
        return found

    def ids_of_special(self) -> set[int]:
        return set(self.ours.special.values()) - {self.ours.special.get("<unk>", -1)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Maker], Pair]:
    made: dict[Maker, Pair] = {}

    def get(make: Maker) -> Pair:
        if make not in made:
            made[make] = Pair(make, tmp_path_factory.mktemp(make.__name__))
        return made[make]

    return get


each = pytest.mark.parametrize("make", words.EVERY, ids=lambda make: make.__name__)


def random_texts(seed: int, count: int) -> Iterator[str]:
    draw = random.Random(seed)
    for _ in range(count):
        top = draw.choice([0x7F, 0x2FF, 0x3FFF, 0xFFFF, 0x10FFFF])
        codes = (draw.randrange(top + 1) for _ in range(draw.randrange(40)))
        yield "".join(" " if 0xD800 <= code < 0xE000 else chr(code) for code in codes)


# ── ids ───────────────────────────────────────────────────────────────────────────────────────


def test_tiktoken_works_where_it_is_proved_and_nowhere_else(
    pairs: Callable[[Maker], Pair],
) -> None:
    engines = {make.__name__: pairs(make).ours.engine for make in words.EVERY}
    proved = {make.__name__ for make in words.PROVED}
    assert engines == {n: "tiktoken" if n in proved else "tokenizers" for n in engines}


@each
def test_ids_are_those_of_the_library(make: Maker, pairs: Callable[[Maker], Pair]) -> None:
    pair = pairs(make)
    for text in [*words.texts(), *random_texts(1, 150)]:
        for special, bos in itertools.product((True, False), repeat=2):
            if special or not (pair.leaks and pair.ours.cut(text) != [(text, None)]):
                ids = pair.ours.encode(text, special=special, bos=bos)
                assert ids == pair.expected(text, special, bos), (text, special, bos)


@each
def test_special_tokens_in_a_text_are_text(make: Maker, pairs: Callable[[Maker], Pair]) -> None:
    pair = pairs(make)
    for token in pair.ours.special:
        for text in (token, f"a{token} b", token * 2):
            ids = pair.ours.encode(text, bos=False)
            assert pair.ids_of_special().isdisjoint(ids), text


def anything() -> st.SearchStrategy[str]:
    parts = ["<|im_end|>", "</s>", "<think>", "\r\n", "  ", "'Ll", "e\u0301", "12", "\u3000", "▁"]
    wild = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return st.lists(wild | st.sampled_from(parts), max_size=8).map("".join)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=anything(), special=st.booleans())
def test_any_text_comes_back(pairs: Callable[[Maker], Pair], text: str, special: bool) -> None:
    for make in (words.gpt2, words.llama3, words.o200k, words.house, words.mistral, words.deepseek):
        pair = pairs(make)
        ids = pair.ours.encode(text, special=special)
        assert ids == pair.expected(text, special, True)
        if pair.byte_level:
            rest = pair.ours.encode(text, special=special, bos=False)
            assert pair.ours.decode(rest, skip_special=False) == text


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\udc00\ud83d", "é" * 9 + "\udfff"])
def test_half_a_surrogate_pair_is_refused(text: str, pairs: Callable[[Maker], Pair]) -> None:
    for make in (words.gpt2, words.llama2):
        with pytest.raises(TextError, match=r"character \d+ is .ud[8-f]\w\w, half of a surrogate"):
            pairs(make).ours.encode(text)


RUNS = ["a", " ", "\u0301", "\n", "A", "中", "9", " \n", "\u3000", "\x00"]


@pytest.mark.parametrize("run", RUNS[:3])
def test_a_megabyte_of_one_letter(run: str, pairs: Callable[[Maker], Pair]) -> None:
    """Also without a stack that overflows, a regex that goes back a million times, …"""
    text = run * (1_000_000 // len(run.encode())) + "x 1"
    ours = pairs(words.llama3).ours
    assert ours.decode(ours.encode(text, bos=False)) == text


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "make", [words.gpt2, words.o200k, words.llama2], ids=lambda make: make.__name__
)
def test_a_megabyte_of_any_letter(make: Maker, run: str, pairs: Callable[[Maker], Pair]) -> None:
    pair = pairs(make)
    text = run * (1_000_000 // len(run.encode())) + "x 1"
    assert pair.ours.encode(text) == pair.expected(text, False, True)


@pytest.mark.parametrize(
    "make", [words.llama3, words.qwen2, words.gemma], ids=lambda make: make.__name__
)
def test_sixty_four_threads_share_a_tokenizer(make: Maker, tmp_path: Path) -> None:
    """A new one, so that everything that is made when first needed is made by many at once."""
    pair = Pair(make, tmp_path)
    jobs = [text for text in words.texts() if len(text) < 300][:64]
    expected = [pair.expected(text, False, True) for text in jobs]
    shown = [pair.text_of(ids, True) for ids in expected]
    together = Barrier(64)

    def work(first: int) -> bool:
        together.wait()
        places = [(first + i) % len(jobs) for i in range(len(jobs))]
        ids = [pair.ours.encode(jobs[i]) for i in places]
        texts = [pair.ours.decode(one) for one in ids]
        return ids == [expected[i] for i in places] and texts == [shown[i] for i in places]

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(work, range(64)))


# ── the proof ─────────────────────────────────────────────────────────────────────────────────


def random_bpe(draw: random.Random) -> dict[str, Any]:
    """Merges that no training would find: tokens that nothing reaches, that two pairs make, …"""
    tokens, merges = list("abc"), []
    for _ in range(draw.randrange(1, 12)):
        pair = [draw.choice(tokens), draw.choice(tokens)]
        if len("".join(pair)) < 6:
            merges.append(pair)
            tokens += {"".join(pair)} - set(tokens)
    if draw.random() < 0.4:
        draw.shuffle(merges)
    tokens += {"abcab", "cc"} - set(tokens)
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *tokens[3:]])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    ignore = draw.random() < 0.4
    document = {"model": {**model, "ignore_merges": ignore}, "added_tokens": []}
    return {**document, "pre_tokenizer": {**level, "trim_offsets": True}}


def test_what_is_proved_is_true() -> None:
    """All words of up to six letters, for hundreds of made-up vocabularies."""
    draw, proved, count = random.Random(7), 0, 250
    alphabet = ["".join(w) for n in range(1, 7) for w in itertools.product("abc", repeat=n)]
    for _ in range(count):
        document = random_bpe(draw)
        pairs = BytePairs.prove(document, set())
        if pairs is None:
            continue
        proved += 1
        library = tokenizers.Tokenizer.from_str(json.dumps(document))
        text = " ".join(draw.sample(alphabet, 250))
        assert pairs.encode(text) == library.encode(text).ids, document["model"]["merges"]
    assert count / 3 < proved < count, "the proof has become empty"


CLASSES = [
    rf"\p{{{name}}}" for name in ("L", "M", "N", "P", "S", "Z", "Lu", "Ll", "Lm", "Lo", "Lt")
]
CLASSES += [r"\s", r"[^\s\p{L}\p{N}]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[\r\n\t]", r"[^\r\n/]"]
BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}


def check_class(pattern: str, text: str) -> None:
    """tiktoken drops what does not match; so does the library when matches are what is left."""
    core = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=BYTE_RANKS, special_tokens={})
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    kept = "".join(piece for piece, _ in split.pre_tokenize_str(text))
    assert bytes(core.encode_ordinary(text)).decode() == kept


EVERYTHING = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


@pytest.mark.parametrize("pattern", CLASSES)
def test_both_engines_read_classes_alike(pattern: str) -> None:
    check_class(pattern, "".join(EVERYTHING[:0x3400]) + "'" + "'".join(EVERYTHING[:0x600]))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CLASSES)
def test_both_engines_read_classes_alike_on_every_character(pattern: str) -> None:
    check_class(pattern, "'".join(EVERYTHING) if "'" in pattern else "".join(EVERYTHING))


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{L}+|\p{N}+|\s+",  # drops what is none of them
        r"[^\s]+|\s+(?!\S)",  # the last blank before a word is nobody's
        r"[^x]+",
        r".+|\s+",  # in one engine a dot is not the end of a line
        r"\p{N}{1,3}+|[^\p{N}]",
        r"\w+|[^\w]",
        r"(?i:ss)|[^ß]|ß",
        r"[[:punct:]]|[^x]|x",
        r"^a|[^x]|x",
        r"\S+?|\s+",
        r"(a|b)|[^x]|x",
        r"[a-z]+|[^x]|x",
        r"[\s&&[^\n]]+|[^x]|x",
        r"\p{Han}|[^x]|x",
        r"(?=a)|[^x]|x",
        r"|[^x]|x",
        r"[^x]|x|",
        "",
        "(" * 3000,
        r"[^\n]+|\s+(?!\S)",  # an end of line before a word is nobody's
        r"\p{L}*|[^x]|x",  # may match nothing
        r"(?:\n* *)|[^x]|x",
        r" ?(?:\n+ *)?|[^x]|x",
        r"\p{N}{3,1}|[^x]|x",  # in one engine possessive
    ],
)
def test_other_patterns_are_left_to_the_library(pattern: str) -> None:
    assert translate(pattern) is None


def random_pattern(draw: random.Random) -> str:
    atoms = [r"\p{L}", r"\p{N}", r"\p{M}", r"\p{Lu}", r"\r", r"\n", r"\s", r"\S", *"aA1_ '/"]
    inside = [*atoms[:7], *"aA1_ '/.,(){}"]

    def atom() -> str:
        chosen = "".join(draw.choices(inside, k=draw.randrange(1, 4)))
        sets = [f"[{chosen}]", f"[^{chosen}]"]
        return draw.choice([draw.choice(atoms), *sets])

    def part() -> str:
        groups = ["(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"(?:\n+ *)?"]
        terms = [atom() + draw.choice(["", "?", "*", "+", "+", "{2}", "{1,3}"]) for _ in range(2)]
        ends = [r"\s+(?!\S)", r"[ \t]+(?!\S)", r"\s+(?![^\s\p{N}])"]
        return draw.choice(
            [draw.choice(ends), "".join(terms), "".join(terms) + draw.choice(groups)]
        )

    return "|".join(part() for _ in range(draw.randrange(1, 5))) + draw.choice(["", r"|\s+|\S"])


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 9))]
)
def test_patterns_that_are_taken_cut_alike(seed: int) -> None:
    made, draw, taken = words.byte_level(words.split(r"[\s\S]+")), random.Random(seed), 0
    ranks = ranks_of(json.loads(made.to_str())["model"], set())
    assert ranks is not None
    texts = [text for text in words.texts() if len(text) < 300]  # the library goes back for ever
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.encode_special_tokens = True
    while taken < 20:
        pattern = random_pattern(draw)
        if translated := translate(pattern):
            made.pre_tokenizer = pre_tokenizers.Sequence([words.split(pattern), level])
            ours = BytePairs(translated, ranks, space=False)
            for text in draw.sample(texts, 20):
                assert ours.encode(text) == made.encode(text).ids, (pattern, text)
            taken += 1


# ── text ──────────────────────────────────────────────────────────────────────────────────────


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool, **more: Any) -> list[str]:
    decoder = tokenizer.decoder(skip, **more)
    return [*map(decoder.push, ids), decoder.finish()]


def spelled(pair: Pair, ids: list[int], skip: bool) -> str:
    """The text by the rule: all bytes, and Python's replacements for those that are no text."""
    silent = set(pair.ours.special.values()) if skip else set()
    said = b"".join(pair.ours.token_bytes(i) for i in ids if i not in silent)
    return said.decode(errors="replace")


@each
def test_deltas_are_the_text_of_the_library(make: Maker, pairs: Callable[[Maker], Pair]) -> None:
    pair, draw = pairs(make), random.Random(3)
    size = pair.ours.vocabulary
    cases = [pair.ours.encode(text, special=True) for text in words.texts()]
    cases += [[draw.randrange(size + 2) for _ in range(draw.randrange(12))] for _ in range(300)]
    for ids in cases:
        for skip in (True, False):
            text, expected = pair.ours.decode(ids, skip), pair.text_of(ids, skip)
            assert "".join(pieces(pair.ours, ids, skip)) == text
            if pair.byte_level:
                assert text == expected == spelled(pair, ids, skip)
            elif "\ufffd" not in text:
                assert text == expected
            else:  # the library replaces a whole run of bytes when one of them is wrong
                assert "\ufffd" in expected
                assert text in (rule := spelled(pair, ids, skip), rule.removeprefix(" "))


BYTE_LETTERS = sorted(LETTERS, key=LETTERS.__getitem__)
LETTER_TEXT = "é\u0301ß中文字👍🏽👨‍👩‍👧𝔘\U0010ffff\ufffd\u07ff\u0800\uffffa\x7f\x80"


@pytest.mark.parametrize("make", [words.gpt2, words.llama2, words.unigram_bytes])
def test_a_character_cut_into_bytes_is_whole_or_not_there(
    make: Maker, pairs: Callable[[Maker], Pair]
) -> None:
    """Every split of every character: the bytes one by one, with nothing else between them."""
    pair = pairs(make)
    names = BYTE_LETTERS if pair.byte_level else words.BYTES
    ids = [pair.id_of(names[byte]) for byte in LETTER_TEXT.encode()]
    parts = pieces(pair.ours, ids, True)
    assert [part for part in parts if part] == list(LETTER_TEXT)
    ends = itertools.accumulate(len(letter.encode()) for letter in LETTER_TEXT)
    assert [i + 1 for i, part in enumerate(parts) if part] == list(ends), "as soon as it can be"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.binary(max_size=12), cut=st.integers(0, 12))
def test_bytes_that_are_no_text_are_replaced_as_python_does(
    pairs: Callable[[Maker], Pair], data: bytes, cut: int
) -> None:
    for make in (words.gpt2, words.mistral):
        pair = pairs(make)
        names = words.BYTES if make is words.mistral else BYTE_LETTERS
        ids = [pair.id_of(names[byte]) for byte in data]
        assert "".join(pieces(pair.ours, ids, True, continuing=True)) == data.decode(
            errors="replace"
        )
        decoder = pair.ours.decoder(continuing=True)
        before = "".join(map(decoder.push, ids[:cut]))
        twin = decoder.fork()
        rest = "".join(map(decoder.push, ids[cut:])) + decoder.finish()
        assert before + rest == data.decode(errors="replace")
        assert before + twin.finish() == data[:cut].decode(errors="replace"), "the fork is apart"


@each
def test_a_fork_goes_its_own_way(make: Maker, pairs: Callable[[Maker], Pair]) -> None:
    ours = pairs(make).ours
    for text in ("", " 日本 é", words.CORPUS[5]):
        ids, other = ours.encode(text), ours.encode("x 👍🏽", bos=False)
        for cut in range(min(len(ids), 12) + 1):
            decoder = ours.decoder()
            start = "".join(map(decoder.push, ids[:cut]))
            twin = decoder.fork()
            for branch, rest in ((decoder, ids[cut:]), (twin, other)):
                end = "".join(map(branch.push, rest)) + branch.finish()
                assert start + end == ours.decode(ids[:cut] + rest)


@pytest.mark.parametrize(
    "make", [words.llama2, words.mistral, words.unigram, words.gpt2, words.bert]
)
def test_what_continues_a_text_keeps_its_space(make: Maker, pairs: Callable[[Maker], Pair]) -> None:
    ours = pairs(make).ours
    ids = ours.encode("the quick brown fox", bos=False)
    for cut in range(1, len(ids)):
        start = ours.decode(ids[:cut])
        assert start + "".join(pieces(ours, ids[cut:], True, continuing=True)) == ours.decode(ids)


KEEP_BLANKS = [words.gpt2, words.llama3, words.qwen2, words.deepseek, words.neox]
KEEP_BLANKS += [words.llama2, words.mistral, words.gemma, words.unigram_bytes]


@pytest.mark.parametrize("make", KEEP_BLANKS, ids=lambda make: make.__name__)
def test_the_rest_of_a_text_has_no_space_in_front(
    make: Maker, pairs: Callable[[Maker], Pair]
) -> None:
    ours = pairs(make).ours
    for text in ("x y", " x", "\nx", "\n\n", "é<b>", "", "▁"):
        said = b"".join(map(ours.token_bytes, ours.encode_rest(text)))
        assert said.decode() == text.replace("▁", " " if b"\xe2" not in said else "▁")


def test_the_bytes_of_a_token(pairs: Callable[[Maker], Pair]) -> None:
    ours, llama = pairs(words.gpt2).ours, pairs(words.llama2).ours
    letters = {ours.token_bytes(i) for i in range(ours.vocabulary)}
    assert {bytes([byte]) for byte in range(256)} <= letters
    ids = ours.encode("naïve 日本\n")
    assert b"".join(map(ours.token_bytes, ids)) == "naïve 日本\n".encode()
    assert llama.token_bytes(llama.special["</s>"]) == b"</s>"
    assert llama.token_bytes(3 + 0xE4) == b"\xe4"
    assert ours.token_bytes(ours.vocabulary) == ours.token_bytes(-1) == b""
    assert ours.decode([-1, ours.vocabulary, 10**12]) == ""
