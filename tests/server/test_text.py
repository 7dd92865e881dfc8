"""Text assembly against the plainest oracle: read everything a letter at a time, then cut."""

import codecs
from itertools import pairwise
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.text import Silent, Text


class Bytes:
    """A tokenizer whose tokens are byte strings, decoded by Python's own incremental codec."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.codec = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, /) -> str:
        return self.codec.decode(self.tokens[token])

    def finish(self) -> str:
        return self.codec.decode(b"", final=True)

    def fork(self) -> Self:
        twin = type(self)(self.tokens)
        twin.codec.setstate(self.codec.getstate())
        return twin


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(pieces: list[bytes], stops: list[str], include: bool = False) -> tuple[list[str], Text]:
    text = Text(Bytes(pieces), tuple(stops), include)
    said = []
    for token in range(len(pieces)):
        said.append(text.push(token))
        if text.stopped is not None:
            break
    said.append(text.finish())
    return said, text


letters = st.text("abé漢", max_size=12)


@settings(max_examples=400, deadline=None)
@given(
    whole=st.binary(max_size=12) | letters.map(str.encode),
    cuts=st.lists(st.integers(0, 12), max_size=6),
    stops=st.lists(st.text("abé漢\ufffd", max_size=4), max_size=4),
    include=st.booleans(),
)
def test_any_split_gives_what_the_oracle_gives(
    whole: bytes, cuts: list[int], stops: list[str], include: bool
) -> None:
    borders = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[a:b] for a, b in pairwise(borders)]
    expected, stop = oracle(whole.decode("utf-8", "replace"), stops, include)
    said, text = run(pieces, stops, include)
    assert ("".join(said), text.stopped) == (expected, stop)
    for i in range(len(said)):  # what was said is never more than what will have been said
        assert expected.startswith("".join(said[:i]))


def test_nothing_is_held_longer_than_needed() -> None:
    said, _ = run([b"a", b"b", b"x", b"ab", b"ab", b"d"], ["abc"])
    assert said == ["", "", "abx", "", "ab", "abd", ""]


def test_a_stop_across_tokens_never_leaks_its_beginning() -> None:
    said, text = run(
        ["né".encode()[:2], "né".encode()[2:] + b"\n", b"\nUser:", b"x"], ["\n\nUser:"]
    )
    assert said == ["n", "é", "", ""]
    assert text.stopped == "\n\nUser:"


def test_the_stop_may_be_the_whole_output() -> None:
    assert run([b"stop"], ["stop"])[0] == ["", ""]
    assert run([b"stop"], ["stop"], include=True)[0] == ["stop", ""]


def test_a_partial_stop_at_the_end_is_text_after_all() -> None:
    assert run([b"so", b"st"], ["stop"])[0] == ["so", "", "st"]


def test_of_two_complete_at_once_the_longer_is_cut() -> None:
    said, text = run([b"xab"], ["b", "ab"])
    assert (said, text.stopped) == (["x", ""], "ab")


def test_forks_go_separate_ways() -> None:
    text = Text(Bytes([b"a", b"b", b"c", "é".encode()[:1], "é".encode()[1:]]), ("abc",))
    assert text.push(0) + text.push(1) == ""
    twin = text.fork()
    assert text.completes(2) == "abc"
    assert text.completes(1) is None
    assert (twin.push(2), twin.stopped) == ("", "abc")
    assert text.stopped is None
    assert (text.push(3), text.fork().push(4), text.push(4)) == ("", "abé", "abé")


def test_empty_stop_strings_stop_nothing() -> None:
    assert run([b"ab"], [""])[0] == ["ab", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = Text(Silent(), ("a",))
    assert text.push(5) + text.fork().finish() == ""


@pytest.mark.parametrize("size", [1 << 16])
def test_a_stop_made_to_be_slow_costs_linear_time(size: int) -> None:
    text = Text(Bytes([b"a" * size]), ("a" * 255 + "b",))
    assert len(text.push(0)) == size - 255
