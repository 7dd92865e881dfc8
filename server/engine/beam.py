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

Nothing here changes in place: a search can be kept, compared, or resumed from.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, reduce
from math import inf, isnan
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from server.engine.tree import Node, agree, ancestor, child, meet, root

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
    top: int = 0  # how many of a row's candidates a node remembers beside its own

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


class _Candidate(NamedTuple):
    row: int
    column: int
    token: int
    logprob: float
    sum: float


def begin() -> Search:
    """A search before its first step: one beam, the prompt."""
    return Search((root(),))


def advance(
    search: Search,
    rules: Rules,
    tokens: Ints,
    logprobs: Floats,
    *,
    strings: Strings | None = None,
    penalty: Floats | None = None,
    noise: Floats | None = None,
) -> Step:
    """One step, from the best successors [beams, candidates] of every live beam, best first.

    `penalty` [beams, candidates] is taken off the sums, not off the nodes' log-probabilities. With
    `noise` [beams, candidates], Gumbel distributed, candidates are drawn instead of taken: they
    rank in the order of the draw, and the best sums of those drawn live on, which is what
    transformers' do_sample does.
    """
    if search.stop is not None:
        raise ValueError(f"the search has stopped ({search.stop}): nothing can be added")
    added = logprobs if penalty is None else logprobs - penalty
    sums = added + np.array([[node.sum] for node in search.live], np.float32)
    order = _rank(search, rules, tokens, sums if noise is None else sums + noise)
    if strings is None or noise is not None:  # else take more, as many as it needs
        order = order[: rules.candidates]
    enough = rules.width if noise is None else len(order)
    going, ended = _part(search, rules, _listed(order, tokens, logprobs, sums), strings, enough)
    going = sorted(going, key=lambda candidate: -candidate.sum)[: rules.width]
    chosen = [*going, *(candidate for candidate, _ in ended)]
    nodes = [_grow(search, rules, i, c, tokens, logprobs) for i, c in enumerate(chosen)]
    live = tuple(nodes[: len(going)])
    pool = _pooled(search, rules, nodes[len(going) :], [stop for _, stop in ended])
    return Step(
        Search(live, pool, search.made + len(nodes), _stop(rules, live, pool)),
        [candidate.row for candidate in going],
        [candidate.token for candidate in going],
    )


def _rank(search: Search, rules: Rules, tokens: Ints, keys: Floats) -> npt.NDArray[np.int64]:
    """The candidates as flat indices, best first; what is masked to -inf is none."""
    if search.length < rules.min_tokens:
        keys = np.where(np.isin(tokens, list(rules.ends)), np.float32(-inf), keys)
    falling = (-keys).ravel()
    order = np.lexsort((tokens.ravel(), _rows(*tokens.shape), falling))
    if isnan(falling[order[-1]]):  # they sort last
        raise ValueError("a candidate's log-probability is not a number: the logits were bad")
    return order[: np.count_nonzero(falling < inf)]


@lru_cache(maxsize=256)
def _rows(rows: int, columns: int) -> Ints:
    return np.repeat(np.arange(rows, dtype=np.int32), columns)


def _listed(
    order: npt.NDArray[np.int64], tokens: Ints, logprobs: Floats, sums: Floats
) -> Iterator[_Candidate]:
    rows, columns = np.divmod(order, tokens.shape[1])
    fields = (rows, columns, tokens.ravel()[order], logprobs.ravel()[order], sums.ravel()[order])
    return map(_Candidate._make, zip(*(field.tolist() for field in fields), strict=True))


def _part(
    search: Search,
    rules: Rules,
    ranked: Iterator[_Candidate],
    strings: Strings | None,
    enough: int,
) -> tuple[list[_Candidate], list[tuple[_Candidate, int | str | None]]]:
    """Who goes on, and who ended early enough in the ranks to count, with what ended it."""
    going: list[_Candidate] = []
    ended: list[tuple[_Candidate, int | str | None]] = []
    last = search.length + 1 == rules.limit
    for rank, candidate in enumerate(ranked):
        row, token = candidate.row, candidate.token
        stop = token if token in rules.ends else strings(row, token) if strings else None
        if stop is None and not last:
            going.append(candidate)
        elif rank < rules.width:
            ended.append((candidate, stop))
        if len(going) == enough or (last and rank + 1 == rules.width):
            break
    return going, ended


def _grow(
    search: Search, rules: Rules, i: int, new: _Candidate, tokens: Ints, logprobs: Floats
) -> Node:
    rivals: tuple[tuple[int, float], ...] = ()
    if rules.top:
        row = tokens[new.row, : rules.top].tolist(), logprobs[new.row, : rules.top].tolist()
        rivals = tuple(zip(*row, strict=True))
    parent, number = search.live[new.row], search.made + i
    return child(parent, number, new.token, new.logprob, new.sum, new.column + 1, rivals)


def _pooled(
    search: Search, rules: Rules, nodes: Sequence[Node], stops: Sequence[int | str | None]
) -> tuple[Ending, ...]:
    """The best of the old and the new; of equals, the old."""
    if not nodes:
        return search.pool
    new = (
        Ending(n, score_of(n.sum, n.length, rules), s) for n, s in zip(nodes, stops, strict=True)
    )
    return tuple(sorted((*search.pool, *new), key=lambda e: -e.score)[: rules.width])


def score_of(total: float, length: int, rules: Rules) -> float:
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
    return score_of(node.sum, rules.limit if never else node.length, rules)


def bound(rules: Rules, node: Node) -> float:
    """What no continuation of the node can exceed."""
    if not rules.falling:
        return inf
    return score_of(node.sum, rules.limit if rules.length_penalty > 0 else node.length + 1, rules)


def best(searches: Sequence[Search]) -> list[Ending]:
    """All finished hypotheses of a search or of diverse groups, best first, ties: older first."""
    pooled = [ending for search in searches for ending in search.pool]
    return sorted(pooled, key=lambda ending: (-ending.score, ending.node.length))


def stable(rules: Rules, searches: Sequence[Search], after: int = 0) -> Node | None:
    """The deepest node that the best answer goes through, whatever the model says from here on.

    It is where these meet: the best finished hypothesis, and every live beam whose bound is above
    its score. At the next step each of them is itself or an extension of one of these, so the
    node only moves down: a token once covered is never taken back. And as each can still win, no
    rule can promise more. Diverse groups are trees of their own and meet where their tokens do;
    the first `after` tokens are known to be equal.
    """
    finished = best(searches)[:1]
    score = finished[0].score if finished else -inf
    contenders = [
        _able(rules, search, score) + [e.node for e in finished if e in search.pool]
        for search in searches
    ]
    meetings = [reduce(meet, nodes) for nodes in contenders if nodes]
    return reduce(lambda one, other: agree(one, other, after), meetings) if meetings else None


def _able(rules: Rules, search: Search, score: float) -> list[Node]:
    """The beams that may still exceed the score; they stand in falling order."""
    if search.stop:
        return []
    live = search.live
    if bound(rules, live[-1]) > score:
        return list(live)
    return [node for node in live if bound(rules, node) > score]


def force(search: Search, length: int) -> Search:
    """What begins as the best beam does, for `length` tokens. The lag is bounded, the answer not
    exact any more."""
    node = ancestor(search.live[0], length)
    live = tuple(beam for beam in search.live if ancestor(beam, length) is node)
    pool = tuple(e for e in search.pool if ancestor(e.node, length) is node)
    return Search(live, pool, search.made, search.stop)
