"""A request while the engine has it: its branches, and all that they hold.

A branch is a row in the making: known tokens, some of them computed. One that continues another's
tokens is a *bud* until its source has computed what they share; then it sprouts, that is, reads
the same pages. n branches of a prompt, and a beam group that is computed again after preemption,
grow from one stem in this way, each distinct token computed once.
"""

from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from msgspec.structs import replace

from server.engine.beam_group import BeamGroup
from server.engine.drafts import Lookup
from server.engine.masks import Mask
from server.engine.pages import link, root
from server.engine.request import Event, Finish, Request
from server.engine.text import Text

PREEMPTIONS = 3  # then a group is pinned
USUAL = 512  # tokens of an answer, at most, that the queue reckons with

Rivals: TypeAlias = list[tuple[int, float]]  # alternatives to a token, best first


@dataclass(slots=True, eq=False)
class Branch:
    """One continuation."""

    group: "Group"
    index: int
    text: Text
    length: int  # tokens known, or sampled in a step in flight
    guesses: int = 0  # how far it pays to guess, as the last time showed
    computed: int = 0  # tokens that are in pages once the steps in flight have ended
    output: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    published: int = 0  # of them, in the prefix index, or equal to one that is
    chain: list[bytes] = field(default_factory=list)  # digests of full pages, when needed
    seat: int = -1
    source: "Branch | None" = None  # a bud's: whose pages it will read …
    fork_at: int = 0  # … this many tokens of them
    finish: Finish | None = None
    lookup: Lookup | None = None  # where guesses come from
    mask: Mask | None = None  # what may come next

    @property
    def todo(self) -> int:
        """Tokens still to compute: the one rule for all rows."""
        return min(self.length, self.group.last) - self.computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Known tokens at these positions."""
        prompt = self.group.prompt
        first = len(prompt)
        if start >= first:
            return self.output[start - first : end - first]
        return prompt[start:end].tolist() + self.output[: max(end - first, 0)]

    def digests(self, count: int, size: int) -> list[bytes]:
        """The chain, at least as far as `count` pages."""
        chain = self.chain
        while len(chain) < count:
            at = len(chain) * size
            chain.append(link(chain[-1] if chain else self.group.root, self.tokens(at, at + size)))
        return chain


@dataclass(eq=False)
class Group:
    """A request's branches, alive or still to sprout."""

    request: Request
    number: int  # of arrival
    blank: Text  # nothing said yet
    mask: Mask | None = None  # what may come first
    draft: int = 0  # the most tokens to guess ahead
    beams: BeamGroup | None = None
    footprint: int = 0  # pages that it can need at worst
    branches: list[Branch] = field(default_factory=list)
    buds: list[Branch] = field(default_factory=list)
    seats: list[int] = field(default_factory=list)  # that no branch sits on
    arrival: float = 0.0
    queued: float = 0.0  # seconds until its first step
    key: float = 0.0  # smaller goes first
    cached: int = 0  # prompt tokens that were found in pages, to begin with
    scored: int = 0  # prompt tokens whose successor's log-probability was asked for …
    scores: list[tuple[float, int, Rivals] | None] = field(default_factory=lambda: [None])  # found
    forks: list[tuple[int, int]] = field(default_factory=list)  # beams: seats to copy next
    rows: int = 0  # computed for beams
    given: int = 0  # tokens of the best beam that are out
    started: bool = False  # it had a step …
    again: bool = False  # … and has to be computed again
    told: bool = False  # it had an event
    over: bool = False  # it had its last
    preempted: int = 0
    suspect: bool = False  # a step with it raised, and nothing good came of it since
    event: Event | None = None  # of the step that is being read

    def __post_init__(self) -> None:
        # Four bytes a token, and nothing for the garbage collector to look through: thousands wait.
        self.prompt = array("i", self.request.prompt)
        self.request = replace(self.request, prompt=[])
        self.root = root(self.request.cache_salt)
        self.stops = frozenset(self.request.sampling.stops)
        self.text = self.blank.fork()  # beams: what is certain
        # The last sample is given out but never fed; where nothing is sampled, the last token of
        # the prompt is not fed either.
        self.last = len(self.prompt) + self.request.max_tokens - 1

    def branch(self, index: int) -> Branch:
        mask = self.mask and self.mask.fork()
        return Branch(self, index, self.blank.fork(), len(self.prompt), self.draft, mask=mask)

    @property
    def weight(self) -> int:
        """Tokens that its place in the queue stands for: the prompt, and what answers usually have.

        Who names no max_tokens may fill the context, and hardly ever does: counted whole, a few
        such chats would close the queue to everybody.
        """
        width = self.request.beams.width if self.request.beams else self.request.n
        return len(self.prompt) + width * min(self.request.max_tokens, USUAL)

    @property
    def living(self) -> list[Branch]:
        return self.branches + self.buds

    @property
    def pinned(self) -> bool:
        """It gave way often enough."""
        return self.preempted >= PREEMPTIONS

    @property
    def width(self) -> int:
        """How many seats it takes."""
        beams = self.request.beams
        return beams.width if beams else len(self.living)

    @property
    def missing(self) -> int:
        """Tokens that it has to compute, each distinct one once."""
        known = sum(branch.length - branch.computed for branch in self.branches)
        return known + sum(bud.length - bud.fork_at for bud in self.buds)

    @property
    def needs_nothing(self) -> bool:
        """No token is wanted, and nothing of the prompt that is not known."""
        scores = self.request.prompt_logprobs is not None and len(self.prompt) > 1
        return not self.request.max_tokens and not scores

    @property
    def unfinished(self) -> list[int]:
        """The choices that are still to end."""
        if self.beams is not None or not self.request.max_tokens:
            return list(range(self.request.n))
        return [branch.index for branch in self.living]

    def stopping(self, row: int, token: int) -> str | None:
        """Beams: the stop string that this token would complete."""
        return self.branches[row].text.completes(token)

    def restart(self) -> None:
        """Everything that is known is to be computed again."""
        self.again = True
        self.scored = len(self.scores) - 1
        for branch in self.living:
            branch.length = len(self.prompt) + len(branch.output)
            branch.computed = branch.published = 0
        self.plant(self.living)

    def plant(self, living: list[Branch]) -> None:
        """Arrange branches so that each distinct token is computed once.

        In order of their tokens, the first is the stem, and each other one a bud of the one before
        it, where they part. A bud that equals its source is sampled where that one is; any other,
        and any beam, computes its own last token, which gives it something to be sampled from.
        """
        living.sort(key=lambda branch: branch.output)
        self.branches, self.buds = living[:1], living[1:]
        living[0].source, living[0].fork_at = None, 0
        for before, branch in pairwise(living):
            twins = branch.output == before.output and self.beams is None
            twice = twins and before.source is not None and before.fork_at == before.length
            branch.source = before.source if twice else before
            shared = len(self.prompt) + _alike(before.output, branch.output)
            branch.fork_at = branch.length if twins else min(shared, branch.length - 1)


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
