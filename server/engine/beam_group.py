"""The beams of one request, as the scheduler steps them.

    beams = BeamGroup(request, vocabulary)    raises InvalidField, with a sentence, at the door
    while not beams.done:
        beams.live                            the nodes whose rows this step has; at first the root
        beams.candidates                      how many successors each row wants: Batch.beam_width
        grown = beams.advance(tokens, logprobs, strings)
        grown.parents, grown.tokens           the next step's rows: the old row to fork, the token
        grown.fixed                           nodes that are certain now: stream their tokens
        grown.tree                            what to tell who watches the tree grow
    beams.answers                             best first: .score, .stop, path(answer.node)

Preemption keeps the group as it is, and the pages of `path(node) for node in beams.live` are
computed again. Diverse beams are searches side by side, each of which pays `diversity_penalty` for
a token as often as the groups before it chose it in this step. Sums and scores have it taken off,
as in transformers 4; log-probabilities have not.
"""

from collections import Counter
from collections.abc import Iterator
from math import inf, log
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from server.engine import beam_events
from server.engine.beam import (
    Ending,
    Floats,
    Ints,
    Rules,
    Search,
    Strings,
    advance,
    best,
    bound,
    force,
    score_of,
    stable,
)
from server.engine.beam_events import Name, living
from server.engine.request import Beams, Request
from server.engine.tree import Node, path, root
from server.errors import InvalidField

SEEN = 128  # successors of a row that beam_sample draws among, where top_k does not say
GOLDEN, MASK = 0x9E3779B97F4A7C15, 0xFFFFFFFFFFFFFFFF


class Grown(NamedTuple):
    """What one step did to the group."""

    parents: list[int]  # of each new row, the old row that it continues
    tokens: list[int]  # of each new row, what it appends
    fixed: list[Node]  # never to be taken back
    tree: bytes  # JSON; empty unless asked for


class BeamGroup:
    """The state of a beam request between steps."""

    def __init__(self, request: Request, vocabulary: int, name: Name = str) -> None:
        if request.beams is None:
            raise ValueError(f"request {request.id} asks for no beams")
        self.beams, self.sampling, self.name = request.beams, request.sampling, name
        self.rules = _rules(request, request.beams)
        self.n = request.n
        self.committed = 0  # tokens told to be certain
        start = root()
        self.searches = [Search((start,), made=1 + (g << 32)) for g in range(self.beams.groups)]
        self.draws = self.beams.sample and not self.sampling.greedy
        self.candidates = self._candidates(vocabulary)

    def _candidates(self, vocabulary: int) -> int:
        wanted = self.rules.candidates * self.beams.groups
        if wanted > vocabulary:
            raise InvalidField(
                f"{self.beams.width} beams with {len(self.rules.ends)} end tokens choose among"
                f" {wanted} successors, and the vocabulary has {vocabulary}: ask for fewer beams",
                "beam_width",
            )
        drawn = self.draws and (self.sampling.top_k or SEEN)
        return min(vocabulary, max(wanted, self.rules.top, drawn))

    @property
    def done(self) -> bool:
        return all(search.stop for search in self.searches)

    @property
    def live(self) -> list[Node]:
        return living(self.searches)

    @property
    def answers(self) -> list[Ending]:
        return best(self.searches)[: self.n]

    def advance(self, tokens: Ints, logprobs: Floats, strings: Strings | None = None) -> Grown:
        """One step, from the successors [rows, candidates or more] of the live beams, best first.
        `strings` tells of (row, token) which stop string it completes."""
        before, rows = self.searches, {node: row for row, node in enumerate(self.live)}
        self.searches = list(self._stepped(tokens, logprobs, strings))
        if self.done and not self.answers:  # masks left no token to anyone
            self.searches = [self._stranded(search) for search in before]
        self._exit()
        fixed, live, tree = self._fix(), self.live, b""
        if self.beams.tree:
            tree = beam_events.change(self.rules, before, self.searches, self.committed, self.name)
        return Grown([rows[n.parent] for n in live], [n.token for n in live], fixed, tree)

    def snapshot(self) -> bytes:
        """The tree as it stands, for a watcher who fell behind."""
        return beam_events.snapshot(self.rules, self.searches, self.committed, self.name)

    def _stepped(self, tokens: Ints, logprobs: Floats, strings: Strings | None) -> Iterator[Search]:
        """One group after the other: each pays for what those before it chose."""
        tokens, logprobs = tokens[:, : self.candidates], logprobs[:, : self.candidates]
        if self.draws:
            logprobs = self._warped(logprobs)
        chosen: Counter[int] = Counter()
        first = 0
        for search in self.searches:
            if search.stop:
                yield search
                continue
            own = slice(first, first + len(search.live))
            step = advance(
                search,
                self.rules,
                tokens[own],
                logprobs[own],
                strings=_shifted(strings, first),
                penalty=self._penalty(tokens[own], chosen),
                noise=gumbel(self.sampling.seed, search.length, tokens) if self.draws else None,
            )
            chosen.update(step.tokens)
            if search.length:  # before its first step, every group reads the prompt's one row
                first = own.stop
            yield step.search

    def _stranded(self, search: Search) -> Search:
        """The beams answer as they stand."""
        scores = [score_of(node.sum, max(node.length, 1), self.rules) for node in search.live]
        pairs = zip(search.live, scores, strict=True)
        pool = tuple(Ending(node, score, None) for node, score in pairs)
        return Search((), pool, search.made, "all_ended")

    def _penalty(self, tokens: Ints, chosen: "Counter[int]") -> Floats | None:
        if not chosen:
            return None
        times = [[chosen[token] for token in row] for row in tokens.tolist()]
        return np.array(times, np.float32) * np.float32(self.beams.diversity_penalty)

    def _warped(self, logprobs: Floats) -> Floats:
        """Temperature, top-k and min-p, in transformers' order."""
        warm = logprobs / np.float32(self.sampling.temperature)
        if self.sampling.top_k:
            warm[:, self.sampling.top_k :] = -inf
        if self.sampling.min_p:
            warm[warm < warm[:, :1] + np.float32(log(self.sampling.min_p))] = -inf
        return warm

    def _exit(self) -> None:
        """`exact_exit` of diverse groups. All at once: while one goes on, the others cost it."""
        if len(self.searches) == 1 or not self.beams.exact_exit:
            return
        finished, running = self.answers, [s for s in self.searches if not s.stop]
        if len(finished) < self.n:
            return
        if all(bound(self.rules, s.live[0]) <= finished[-1].score for s in running):
            self.searches = [replace(s, stop=s.stop or "exact_exit") for s in self.searches]

    def _fix(self) -> list[Node]:
        """What became certain, or was forced to be."""
        if self.beams.mode == "final" and not self.done:
            return []
        fixed = self._certain()
        if self.beams.mode == "windowed" and not self.done:
            search, answers = self.searches[0], self.answers
            length = search.length - self.beams.window
            sure = answers and self.committed == answers[0].node.length
            if length > self.committed and not sure:
                self.searches = [force(search, length)]
                fixed += self._certain()
        return fixed

    def _certain(self) -> list[Node]:
        node = stable(self.rules, self.searches, self.committed)
        fixed = path(node, self.committed) if node else []
        self.committed += len(fixed)
        return fixed


def _rules(request: Request, beams: Beams) -> Rules:
    """Of each search in the group."""
    sampling, refused = request.sampling, _refused(request, beams)
    if refused:
        raise InvalidField(*refused)
    width = beams.width // beams.groups
    try:
        return Rules(
            width=width,
            limit=request.max_tokens,
            n=min(request.n, width),
            ends=frozenset(sampling.stops),
            min_tokens=sampling.min_tokens,
            length_penalty=beams.length_penalty,
            # One beam is the greedy path, which ends where it ends.
            early_stopping=beams.early_stopping if beams.width > 1 else True,
            exact_exit=beams.exact_exit and beams.groups == 1,
            falling=_falls(request, beams),
            strings=bool(request.stop),
            top=request.logprobs or 0,
        )
    except ValueError as error:
        raise InvalidField(str(error), "length_penalty") from error


def _refused(request: Request, beams: Beams) -> tuple[str, str] | None:
    """Why there is no such search, and the field."""
    if request.max_tokens < 1:
        return f"max_tokens is {request.max_tokens}: beams need at least 1", "max_tokens"
    if request.n > beams.width:
        return f"n is {request.n}, but {beams.width} beams give at most so many answers", "n"
    if beams.width % beams.groups:
        return f"{beams.width} beams do not divide into {beams.groups} groups", "num_beam_groups"
    if beams.groups > 1 and beams.sample:
        return "diverse groups take the best successors: they cannot also be drawn", "beam_sample"
    if beams.mode == "windowed" and (beams.groups > 1 or beams.window < 1):
        return "a windowed stream needs a window of 1 or more, and one group", "beam_stream"
    if beams.sample and (request.sampling.top_p < 1 or request.sampling.typical_p < 1):
        return "beams are drawn with temperature, top_k and min_p: leave top_p out", "top_p"
    return None


def _falls(request: Request, beams: Beams) -> bool:
    """Whether no log-probability can be above 0 once everything is added to it."""
    sampling = request.sampling
    return (
        all(bias <= 0 for bias in sampling.logit_bias.values())
        and sampling.frequency_penalty >= 0
        and sampling.presence_penalty >= 0
        and beams.diversity_penalty >= 0
    )


def _shifted(strings: Strings | None, first: int) -> Strings | None:
    return strings and (lambda row, token: strings(first + row, token))


def gumbel(seed: int, position: int, tokens: Ints) -> Floats:
    """[rows, candidates] Gumbel noise, a function of (seed, position, row, token) alone.

    The bits are SplitMix64's finaliser, twice.
    """
    state = np.arange(len(tokens), dtype=np.uint64)[:, None] << np.uint64(32)
    state = _mixed(state + tokens.astype(np.uint64))
    salt = _mixed(np.array([seed & MASK, position], np.uint64) + np.uint64(GOLDEN))
    bits = _mixed(state ^ salt[0] ^ (salt[1] << np.uint64(1)))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform)).astype(np.float32)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
