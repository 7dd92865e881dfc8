"""Pages against a model so plain that it can be seen to be right: a dict of reader counts."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.pages import Pages, link, root


def chain(tokens: list[int], size: int, salt: str = "") -> list[bytes]:
    digests = [root(salt)]
    for at in range(0, len(tokens) - size + 1, size):
        digests.append(link(digests[-1], tokens[at : at + size]))
    return digests[1:]


def test_three_numbers_always_add_up() -> None:
    pages = Pages(4, 2)
    taken = [pages.take() for _ in range(3)]
    assert (pages.live, pages.cached, pages.free) == (3, 0, 1)
    pages.publish(taken[0], chain([1, 2], 2)[0])
    pages.drop(reversed(taken))
    assert (pages.live, pages.cached, pages.free) == (0, 1, 3)
    pages.check([])


def test_a_match_pins_and_stops_at_the_first_gap() -> None:
    pages = Pages(8, 2)
    digests = chain([1, 2, 3, 4, 5, 6], 2)
    mine = [pages.take() for _ in digests]
    for page, digest in [(mine[0], digests[0]), (mine[2], digests[2])]:
        pages.publish(page, digest)
    assert pages.match(digests) == mine[:1]
    pages.check([mine, mine[:1]])
    assert not pages.own(mine[0])


def test_the_longest_unused_goes_first_and_leaves_before_roots() -> None:
    pages = Pages(2, 1)
    digests = chain([1, 2], 1)
    mine = [pages.take(), pages.take()]
    for page, digest in zip(mine, digests, strict=True):
        pages.publish(page, digest)
    pages.drop(reversed(mine))
    assert pages.take() == mine[1]
    assert pages.match(digests) == mine[:1]


def test_equal_contents_are_published_once() -> None:
    pages = Pages(2, 1)
    (digest,) = chain([7], 1)
    first, second = pages.take(), pages.take()
    pages.publish(first, digest)
    pages.publish(second, digest)
    pages.drop([second, first])
    assert (pages.cached, pages.free) == (1, 1)
    assert pages.match([digest]) == [first]


def test_what_a_step_in_flight_may_write_is_not_given_away() -> None:
    pages = Pages(1, 1)
    page = pages.take()
    pages.launched()
    pages.drop([page])
    assert (pages.live, pages.available) == (1, 0)
    pages.launched()
    pages.ended()
    assert pages.take() == page


def test_a_page_found_in_limbo_waits_for_its_newest_step() -> None:
    pages = Pages(1, 1)
    (digest,) = chain([7], 1)
    page = pages.take()
    pages.publish(page, digest)
    pages.launched()
    pages.drop([page])
    pages.launched()
    assert pages.match([digest]) == [page]
    pages.drop([page])
    pages.ended()
    assert pages.available == 0
    pages.ended()
    assert (pages.cached, pages.free) == (1, 0)


def test_forgotten_pages_are_still_read_but_never_found() -> None:
    pages = Pages(2, 1)
    digests = chain([1, 2], 1)
    mine = [pages.take(), pages.take()]
    for page, digest in zip(mine, digests, strict=True):
        pages.publish(page, digest)
    pages.drop(mine[1:])
    pages.reset()
    assert pages.match(digests) == []
    assert (pages.live, pages.cached, pages.free) == (1, 0, 1)
    pages.check([mine[:1]])


def test_parents_salts_and_borders_tell_prefixes_apart() -> None:
    prompts = [[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 4, 3], [12, 3, 3, 4], [1, 2, 3, 2**31 - 1]]
    seen = {chain(p, 2, salt)[-1] for p in prompts for salt in ("", "a", "b", "\ud800")}
    assert len(seen) == 4 * len(prompts)


def test_without_caching_nothing_is_found() -> None:
    pages = Pages(2, 1, caching=False)
    (digest,) = chain([7], 1)
    page = pages.take()
    pages.publish(page, digest)
    pages.drop([page])
    assert pages.match([digest]) == []
    assert pages.cached == 0


@pytest.mark.parametrize(("count", "size"), [(0, 16), (4, 0), (-1, 1)])
def test_nonsense_sizes_are_refused(count: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{count} pages of {size} tokens"):
        Pages(count, size)


def broken(pages: Pages) -> None:
    with pytest.raises(RuntimeError, match="page books are wrong"):
        pages.check([[0]])


def test_check_sees_each_kind_of_damage() -> None:
    def fresh() -> Pages:
        pages = Pages(3, 1)
        assert pages.take() == 0
        pages.check([[0]])
        return pages

    pages = fresh()
    pages.share([0])
    broken(pages)
    pages = fresh()
    pages._free.append(1)
    broken(pages)
    pages = fresh()
    pages._free.pop()
    broken(pages)
    pages = fresh()
    pages._digest[1] = b"x"
    broken(pages)
    pages = fresh()
    pages._idle[pages._free.pop()] = None
    broken(pages)
    pages = fresh()
    pages._index[b"x"] = 0
    broken(pages)


class Books(RuleBasedStateMachine):
    """Random calls; the tables held here are the truth that the books must equal."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(6, 1)
        self.tables: list[list[int]] = []
        self.prefixes: list[list[bytes]] = []
        self.flying = 0

    @precondition(lambda self: self.pages.available > 0)
    @rule()
    def take(self) -> None:
        self.tables.append([self.pages.take()])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def match(self, tokens: list[int]) -> None:
        self.tables.append(self.pages.match(chain(tokens, 1)))

    @precondition(lambda self: self.tables and self.pages.available > 0)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow_and_publish(self, data: st.DataObject, token: int) -> None:
        tokens = [*data.draw(st.lists(st.integers(0, 1), max_size=3)), token]
        digests = chain(tokens, 1)
        table = self.pages.match(digests)
        self.tables.append(table)
        while len(table) < len(tokens) and self.pages.available:
            table.append(self.pages.take())
            assert self.pages.own(table[-1])
        for page, digest in zip(table, digests, strict=False):
            self.pages.publish(page, digest)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pages.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        before = self.pages.available
        self.pages.drop(reversed(table))
        if self.flying:
            assert self.pages.available == before

    @precondition(lambda self: self.flying < 2)
    @rule()
    def launch(self) -> None:
        self.pages.launched()
        self.flying += 1

    @precondition(lambda self: self.flying)
    @rule()
    def end(self) -> None:
        self.pages.ended()
        self.flying -= 1

    @rule()
    def reset(self) -> None:
        self.pages.reset()

    @invariant()
    def books_are_right(self) -> None:
        self.pages.check(self.tables)
        assert self.pages.free + self.pages.cached + self.pages.live == 6


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBooks = Books.TestCase
