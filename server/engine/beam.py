"""One beam step as a pure function on numbers, and the part of a search that is fixed for good.

The semantics are transformers' `generate`. With k = width, c = tokens so far with the new one,
M = limit, α = length_penalty, E = ends:

    sum = sum(parent) + logprob        float32, one addition a step, never from scratch
    rank the candidates of all rows    falling sum; ties: the smaller row, then the smaller token
    a candidate ends                   if its token is in E, completes a stop string, or c = M
    one that ends at a rank < k        joins the pool with score sum / c^α; k stay, older win ties
    one that ends at a rank >= k       is forgotten: neither finished nor alive
    the first k that do not end        are the beams of the next step
    the search stops                   when no beam is left, or the pool is full and early_stopping,
                                       or full and best sum / c^α <= worst score ("never": M^α)

One exit more changes steps, never the answer: `exact_exit`, when no beam can reach the n-th best
score any more. Sums only fall, so a beam reaches sum / M^α at most (α > 0), or sum / (c+1)^α.

    search = begin()
    while search.stop is None:
        tokens, logprobs = ...         [beams, rules.candidates] of each live beam, best first
        step = advance(search, rules, tokens, logprobs)
        search = step.search           row i: step.tokens[i] after what row step.parents[i] held
        stable(rules, [search])        a node: its path begins the answer, whatever comes
    search.pool[:rules.n]              the answer, best first

Nothing here changes in place: a search can be kept, compared, or resumed from. A node holds its
parent, so what no beam stands on is freed by itself.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from math import inf, isnan
from typing import Literal, NamedTuple, cast

import msgspec
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Stop = Literal["all_ended", "pool_full", "not_improvable", "exact_exit"]
Strings = Callable[[int, int], str | None]  # (row, token) -> the stop string that this completes


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What stays the same through a search."""

    width: int
    limit: int  # the most tokens of an answer, its end token counted
    n: int = 1
    ends: frozenset[int] = frozenset()
    min_tokens: int = 0  # until then no token of `ends` is a candidate
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    exact_exit: bool = True
    falling: bool = True  # log-probabilities are <= 0; a positive bias breaks it, and every bound
    strings: bool = False  # stop strings end candidates too: look at some more

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.width:
            raise ValueError(
                f"n is {self.n}, but {self.width} beams give 1 to {self.width} answers"
            )
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}: a search needs at least one token")
        if not 1e-30 < self.limit ** min(max(self.length_penalty, -99.0), 99.0) < 1e30:
            raise ValueError(
                f"length_penalty {self.length_penalty} over {self.limit} tokens leaves float32:"
                " choose one nearer to 0"
            )

    @property
    def candidates(self) -> int:
        """How many a row suffice: beside each that goes on, at most |E| end."""
        return max(2, 1 + len(self.ends) + self.strings) * self.width


class Node(msgspec.Struct, frozen=True, eq=False):
    """A token of the tree."""

    number: int
    parent: "Node"  # the root's is None, and is never asked for
    jump: "Node"  # an ancestor, chosen so that every other is O(log length) hops away
    token: int
    logprob: float
    sum: float
    length: int
    rank: int  # of the token in its row: 1 is the likeliest


class Ending(msgspec.Struct, frozen=True, eq=False):
    """A finished hypothesis."""

    node: Node
    score: float
    stop: int | str | None  # the id or string that ended it; None: the limit


class Search(msgspec.Struct, frozen=True, eq=False):
    """A search between two steps."""

    live: tuple[Node, ...]  # the beams, by falling sum; row i of a step continues live[i]
    pool: tuple[Ending, ...] = ()  # by falling score
    made: int = 1  # numbers that nodes have used up
    stop: Stop | None = None

    @property
    def length(self) -> int:
        """Tokens that every beam has."""
        return self.live[0].length


class Step(NamedTuple):
    """What one step did."""

    search: Search
    parents: list[int]  # of each new row, the old row that it continues
    tokens: list[int]  # of each new row, what it appends
    admitted: list[Ending]  # new in the pool
    evicted: list[Ending]  # no longer there


def begin() -> Search:
    """A search before its first step: one beam, the prompt."""
    nothing = cast(Node, None)
    return Search((Node(0, nothing, nothing, -1, 0.0, 0.0, 0, 0),))


def advance(
    search: Search,
    rules: Rules,
    tokens: Ints,
    logprobs: Floats,
    strings: Strings | None = None,
    noise: Floats | None = None,
) -> Step:
    """One step, from the best successors [beams, candidates] of every live beam, best first.

    With `noise` [beams, candidates], Gumbel distributed, the candidates are drawn instead of
    taken: they rank in the order of the draw, and the best sums among those drawn live on, which
    is what transformers' do_sample does.
    """
    if search.stop is not None:
        raise ValueError(f"the search has stopped ({search.stop}): nothing can be added")
    sums = logprobs + np.array([[node.sum] for node in search.live], np.float32)
    order = _rank(search, rules, tokens, sums if noise is None else sums + noise)
    drawn = order if noise is None else order[: rules.candidates]
    enough = rules.width if noise is None else len(drawn)
    going, ended = _select(search, rules, tokens, logprobs, sums, drawn, enough, strings)
    going = sorted(going, key=lambda grown: -grown[0].sum)[: rules.width]
    pool = sorted([*search.pool, *ended], key=lambda ending: -ending.score)[: rules.width]
    live = tuple(node for node, _ in going)
    return Step(
        Search(live, tuple(pool), search.made + len(order), _stop(rules, live, pool)),
        [row for _, row in going],
        [node.token for node in live],
        [ending for ending in ended if ending in pool],
        [ending for ending in search.pool if ending not in pool],
    )


def _rank(search: Search, rules: Rules, tokens: Ints, keys: Floats) -> list[int]:
    """The candidates as flat indices, best first; what is masked to -inf is none."""
    if search.length < rules.min_tokens:
        keys = np.where(np.isin(tokens, list(rules.ends)), np.float32(-inf), keys)
    falling = (-keys).ravel()
    order = np.lexsort((tokens.ravel(), _rows(*tokens.shape), falling))
    if isnan(falling[order[-1]]):  # they sort last
        raise ValueError(
            "a candidate's log-probability is not a number: the model's logits are bad"
        )
    return cast(list[int], order[: np.count_nonzero(falling < inf)].tolist())


@lru_cache(maxsize=256)
def _rows(rows: int, columns: int) -> Ints:
    return np.repeat(np.arange(rows, dtype=np.int32), columns)


def _select(
    search: Search,
    rules: Rules,
    tokens: Ints,
    logprobs: Floats,
    sums: Floats,
    order: list[int],
    enough: int,
    strings: Strings | None,
) -> tuple[list[tuple[Node, int]], list[Ending]]:
    """Who goes on, each with its old row, and who ended at a rank < width."""
    ids, chances, totals = tokens.ravel().tolist(), logprobs.ravel().tolist(), sums.ravel().tolist()
    going: list[tuple[Node, int]] = []
    ended: list[Ending] = []
    columns, last = tokens.shape[1], search.length + 1 == rules.limit
    for rank, at in enumerate(order):
        row, column = divmod(at, columns)
        token = ids[at]
        stop = token if token in rules.ends else strings(row, token) if strings else None
        goes_on = stop is None and not last
        if goes_on or rank < rules.width:
            number = search.made + rank
            node = _grow(search.live[row], number, token, chances[at], totals[at], column + 1)
            if goes_on:
                going.append((node, row))
            else:
                ended.append(Ending(node, _score(node.sum, node.length, rules), stop))
        if len(going) == enough or (last and rank + 1 == rules.width):
            break
    return going, ended


def _grow(parent: Node, number: int, token: int, logprob: float, total: float, rank: int) -> Node:
    near = parent.jump  # two equal hops in a row become one: Myers' skew-binary jump pointers
    even = (
        near is not None
        and near.jump is not None
        and (parent.length - near.length == near.length - near.jump.length)
    )
    jump = near.jump if even else parent
    return Node(number, parent, jump, token, logprob, total, parent.length + 1, rank)


def _score(total: float, length: int, rules: Rules) -> float:
    """sum / length^α, rounded to float32 where torch would."""
    return float(np.float32(total / _power(length, rules.length_penalty)))


@lru_cache(maxsize=4096)
def _power(length: int, penalty: float) -> float:
    return float(np.float32(length**penalty))


def _stop(rules: Rules, live: Sequence[Node], pool: Sequence[Ending]) -> Stop | None:
    if not live:
        return "all_ended"
    if len(pool) == rules.width:
        if rules.early_stopping is True:
            return "pool_full"
        if attainable(rules, live[0]) <= pool[-1].score:
            return "not_improvable"
    if (
        rules.exact_exit
        and len(pool) >= rules.n
        and bound(rules, live[0]) <= pool[rules.n - 1].score
    ):
        return "exact_exit"
    return None


def attainable(rules: Rules, node: Node) -> float:
    """What transformers takes for the best score of the node's continuations."""
    never = rules.early_stopping == "never" and rules.length_penalty > 0
    return _score(node.sum, rules.limit if never else node.length, rules)


def bound(rules: Rules, node: Node) -> float:
    """What no continuation of the node can exceed."""
    if not rules.falling:
        return inf
    return _score(node.sum, rules.limit if rules.length_penalty > 0 else node.length + 1, rules)


def best(searches: Sequence[Search]) -> list[Ending]:
    """All finished hypotheses of a search or of diverse groups, best first, ties: older first."""
    pooled = [ending for search in searches for ending in search.pool]
    return sorted(pooled, key=lambda ending: (-ending.score, ending.node.length))


def stable(rules: Rules, searches: Sequence[Search]) -> Node:
    """The deepest node that the best answer has, whatever the model says from here on.

    It is where these meet: the best finished hypothesis, and every live beam whose bound is above
    its score. Both sets only shrink or grow longer, so the node only moves down: nothing that it
    has covered is ever taken back. And each of them can still win, so no rule can promise more.
    """
    finished = best(searches)[:1]
    score = finished[0].score if finished else -inf
    able = [b for s in searches if s.stop is None for b in s.live if bound(rules, b) > score]
    return reduce(meet, able + [ending.node for ending in finished])


def meet(one: Node, other: Node) -> Node:
    """Their deepest common ancestor, in O(log length)."""
    if one.length < other.length:
        one, other = other, one
    one = ancestor(one, other.length)
    while one is not other:
        far = one.jump is not other.jump
        one, other = (one.jump, other.jump) if far else (one.parent, other.parent)
    return one


def ancestor(node: Node, length: int) -> Node:
    """The first `length` tokens of a node's path, as their last node."""
    while node.length > length:
        node = node.jump if node.jump.length >= length else node.parent
    return node


def path(node: Node, after: int = 0) -> list[Node]:
    """The nodes that lead to this one, itself included, without the first `after`."""
    nodes = []
    while node.length > after:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]
