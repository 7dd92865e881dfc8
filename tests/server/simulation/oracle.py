"""What each request gets when it is alone: computed from its tokens, without pages or batches."""

import codecs
from dataclasses import dataclass, field

import numpy as np

from server.engine.beam_group import BeamGroup
from server.engine.request import Finish, Request
from server.engine.tree import path
from tests.server.simulation.executor import (
    VOCABULARY,
    WORD,
    draw,
    logprob,
    rivals,
    slot,
    successors,
)
from tests.server.simulation.words import PIECES

Rivals = list[tuple[int, float]]


@dataclass
class Told:
    """Everything about one choice."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top: list[Rivals] = field(default_factory=list)
    finish: Finish | None = None
    stop: int | str | None = None
    score: float | None = None
    cumulative: float | None = None


class Speaker:
    """Text read a letter at a time by Python's own codec, with the plainest search for stops."""

    def __init__(self, request: Request) -> None:
        self.stops, self.include = request.stop, request.include_stop
        self.codec = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.stopped = "", ""

    def push(self, token: int) -> None:
        self._say(self.codec.decode(PIECES[token]))

    def finish(self) -> str:
        if not self.stopped:
            self._say(self.codec.decode(b"", final=True))
        return self.text

    def _say(self, piece: str) -> None:
        for letter in piece:
            self.text += letter
            complete = [stop for stop in self.stops if self.text.endswith(stop)]
            if complete:
                self.stopped = max(complete, key=len)
                if not self.include:
                    self.text = self.text[: -len(self.stopped)]
                return


def alone(request: Request) -> list[Told]:
    """Each choice of the request."""
    if request.beams is not None:
        return _beams(request)
    if not request.max_tokens:
        return [Told(finish="length") for _ in range(request.n)]
    context = context_of(request.prompt)
    return [_branch(request, index, context) for index in range(request.n)]


def context_of(tokens: list[int]) -> int:
    return sum(slot(token, at) for at, token in enumerate(tokens)) & WORD


def _branch(request: Request, index: int, context: int) -> Told:
    told, speaker, sampling = Told(), Speaker(request), request.sampling
    position = len(request.prompt)
    while told.finish is None:
        token = draw(context, context, sampling, index, len(told.tokens), position)
        told.tokens.append(token)
        if request.logprobs is not None:
            chance, rank = logprob(context, token)
            told.logprobs.append(chance)
            told.ranks.append(rank)
            told.top.append(rivals(context, request.logprobs))
        _judge(request, told, speaker)
        context = (context + slot(token, position)) & WORD
        position += 1
    told.text = speaker.finish()
    return told


def _judge(request: Request, told: Told, speaker: Speaker) -> None:
    token = told.tokens[-1]
    if token in request.sampling.stops:
        told.finish, told.stop = "stop", token
        if request.include_stop and token not in request.eos:
            speaker.push(token)
        return
    speaker.push(token)
    if speaker.stopped:
        told.finish, told.stop = "stop", speaker.stopped
    elif len(told.tokens) == request.max_tokens:
        told.finish = "length"


def prompt_logprobs(request: Request) -> list[tuple[float, int, Rivals] | None]:
    if request.prompt_logprobs is None:
        return []
    found: list[tuple[float, int, Rivals] | None] = [None]
    context = 0
    for at, token in enumerate(request.prompt[:-1]):
        context = (context + slot(token, at)) & WORD
        chance, rank = logprob(context, request.prompt[at + 1])
        found.append((chance, rank, rivals(context, request.prompt_logprobs)))
    return found


def _beams(request: Request) -> list[Told]:
    """The same search, every row from scratch."""
    group = BeamGroup(request, VOCABULARY)
    rows: list[list[int]] = [[]]
    start = context_of(request.prompt)

    def completes(row: int, token: int) -> str | None:
        speaker = Speaker(request)
        for one in [*rows[row], token]:
            speaker.push(one)
        return speaker.stopped or None

    while not group.done:
        found = []
        for row in rows:
            context = start
            for at, token in enumerate(row, len(request.prompt)):
                context = (context + slot(token, at)) & WORD
            found.append(successors(context, context, request.sampling, group.candidates))
        grown = group.advance(
            np.array([[token for token, _ in row] for row in found], np.int32),
            np.array([[chance for _, chance in row] for row in found], np.float32),
            completes if request.stop else None,
        )
        pairs = zip(grown.parents, grown.tokens, strict=True)
        rows = [[*rows[parent], token] for parent, token in pairs]
    told = []
    for answer in group.answers:
        one, speaker = Told(), Speaker(request)
        for node in path(answer.node):
            one.tokens.append(node.token)
            if request.logprobs is not None:
                one.logprobs.append(node.logprob)
                one.ranks.append(node.rank)
                one.top.append(list(node.rivals[: request.logprobs]))
            if node.token not in request.sampling.stops or (
                request.include_stop and node.token not in request.eos
            ):
                speaker.push(node.token)
        one.text = speaker.finish()
        one.finish = "length" if answer.stop is None else "stop"
        one.stop, one.score, one.cumulative = answer.stop, answer.score, answer.node.sum
        told.append(one)
    return told
