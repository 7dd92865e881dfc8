"""What the engine says, one branch at a time: deltas. A whole answer is the sum of its deltas."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from server.api.ask import Asked
from server.api.served import Words
from server.engine.request import Choice, Event, Finish

WORST = -9999.0  # JSON has no infinity


@dataclass(slots=True)
class Token:
    """A token as log-probabilities show it."""

    id: int
    text: str
    data: bytes
    logprob: float | None  # the first token of a prompt has none
    offset: int = 0  # characters of the branch's text before it
    rank: int = 0
    top: list["Token"] | None = None  # falling


@dataclass(slots=True)
class Delta:
    """What is new of one choice."""

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    stop: int | str | None = None
    first: bool = False
    beam: dict[str, Any] | None = None

    def __iadd__(self, more: "Delta") -> "Delta":
        self.text += more.text
        self.ids += more.ids
        self.tokens += more.tokens
        self.finish = more.finish or self.finish
        self.stop = more.stop if more.stop is not None else self.stop
        self.beam = more.beam or self.beam
        return self

    @property
    def plain(self) -> bool:
        """Whether there is text, and nothing else to say."""
        more = self.tokens or self.ids or self.beam or self.first
        return bool(self.text) and self.finish is None and self.stop is None and not more

    @property
    def seen(self) -> bool:
        """Whether a client could tell that it was sent."""
        return bool(self.text or self.finish or self.tokens or self.ids or self.first)


@dataclass(slots=True)
class Usage:
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    beam_rows: int = 0

    def body(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        return made | ({"beam_rows_computed": self.beam_rows} if self.beam_rows else {})


class Branch:
    """One choice as it grows: where its text is, and which tokens are not shown yet."""

    def __init__(self, asked: Asked, index: int) -> None:
        self._asked = asked
        self._index = index
        self.begun = False
        self._said = 0  # bytes of text given out
        self._spelled = 0  # bytes of the tokens that came
        self._held: list[tuple[int, Token]] = []  # where it begins in these bytes
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self.logprob = 0.0  # the sum over its tokens, and …
        self.length = 0  # … their number

    def echo(self, text: str, tokens: list[Token]) -> Delta:
        """The prompt itself, before anything is made."""
        self.begun = True
        for token in tokens:
            self._place(token)
        self._offset = len(text)
        self._characters.reset()
        return Delta(self._index, text, [], tokens, first=True)

    def push(self, choice: Choice) -> Delta:
        delta = Delta(self._index, choice.text, finish=choice.finish, stop=choice.stop)
        delta.first, self.begun = not self.begun, True
        self.length += len(choice.tokens)
        if choice.logprobs:
            self.logprob += sum(choice.logprobs)
        if choice.tokens and self._asked.body.return_token_ids:
            delta.ids = list(choice.tokens)
        if choice.score is not None:
            delta.beam = self._beam(choice)
        if self._asked.top is not None:
            delta.tokens = self._show(choice)
        return delta

    def _beam(self, choice: Choice) -> dict[str, Any]:
        return {
            "score": choice.score,
            "cumulative_logprob": choice.cumulative_logprob,
            "length": self.length,
            "rank": self._index % self._asked.n,
        }

    def _show(self, choice: Choice) -> list[Token]:
        """The tokens whose text is out. Others wait: a stop string may still take them away."""
        self._said += len(choice.text.encode())
        for at, id in enumerate(choice.tokens):
            top = choice.top[at][: self._asked.top] if choice.top else []
            token = tell(self._asked, id, choice.logprobs[at], choice.ranks[at : at + 1], top)
            self._place(token)
            self._held.append((self._spelled, token))
            self._spelled += len(token.data)
        if not self._asked.body.stop:
            out, self._held = self._held, []
        elif choice.finish:
            cut = self._said if isinstance(choice.stop, str) else self._spelled + 1
            out, self._held = [pair for pair in self._held if pair[0] < cut], []
        else:
            out = [pair for pair in self._held if pair[0] + len(pair[1].data) <= self._said]
            self._held = self._held[len(out) :]
        return [token for _, token in out]

    def _place(self, token: Token) -> None:
        token.offset = self._offset
        self._offset += len(self._characters.decode(token.data))


def tell(
    asked: Asked, id: int, logprob: float | None, rank: list[int], top: list[tuple[int, float]]
) -> Token:
    rivals = [spell(asked, rival, value) for rival, value in top]
    token = spell(asked, id, logprob)
    token.rank, token.top = (rank[0] if rank else 0), rivals
    return token


def spell(asked: Asked, id: int, logprob: float | None) -> Token:
    """A token with its text."""
    text, data = _spelled(asked.served.words, id)
    return Token(id, text, data, None if logprob is None else max(logprob, WORST))


@lru_cache(1 << 14)  # rivals are often the same few thousand
def _spelled(words: Words, id: int) -> tuple[str, bytes]:
    """A piece of a character is spelled as OpenAI does."""
    data = words.token_bytes(id)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return text, data


class Answer:
    """All branches of all prompts, fed with events."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.usage = Usage(prompt=sum(len(prompt.ids) for prompt in asked.prompts))
        self.prompt_tokens: list[list[Token] | None] = [None] * len(asked.prompts)
        self.branches = [Branch(asked, i) for i in range(len(asked.prompts) * asked.best_of)]
        self._open = [set(range(asked.best_of)) for _ in asked.prompts]
        self._new = [True] * len(asked.prompts)
        self._texts = asked.top is None and not asked.body.return_token_ids  # text is all it shows

    def word(self, number: int, event: Event) -> tuple[int, str] | None:
        """Which choice went on, and its new text, when an event says no more, as most do. What it
        says otherwise is left for `push`."""
        if event.done or len(event.choices) != 1 or not self._texts:
            return None
        choice = event.choices[0]
        index = number * self.asked.best_of + choice.index
        branch = self.branches[index]
        if choice.finish or not choice.text or not branch.begun:
            return None
        branch.length += len(choice.tokens)
        self.usage.completion += len(choice.tokens)
        return index, choice.text

    def push(self, number: int, event: Event) -> list[Delta]:
        """What an event of one prompt adds."""
        base = number * self.asked.best_of
        deltas: list[Delta] = []
        if self._new[number]:
            self._new[number] = False
            self.usage.cached += event.cached_tokens
            deltas += self._begin(number, event, base)
        for choice in event.choices:
            self.usage.completion += len(choice.tokens)
            if choice.finish:
                self._open[number].discard(choice.index)
            deltas.append(self.branches[base + choice.index].push(choice))
        if event.done:
            self.usage.beam_rows += event.beam_rows
            for index in self._open[number]:  # an answer of no tokens says nothing of them
                ended = Choice(index=index, finish="length")
                deltas.append(self.branches[base + index].push(ended))
        return [delta for delta in deltas if delta.seen]

    def _begin(self, number: int, event: Event, base: int) -> Iterator[Delta]:
        asked = self.asked
        if asked.requests[number].prompt_logprobs is not None:
            self.prompt_tokens[number] = list(self._prompt_tokens(number, event))
        if asked.echo:
            for branch in self.branches[base : base + asked.best_of]:
                shown = list(self._prompt_tokens(number, event)) if asked.top is not None else []
                yield branch.echo(asked.prompts[number].text, shown)

    def _prompt_tokens(self, number: int, event: Event) -> Iterator[Token]:
        prompt = self.asked.prompts[number].ids
        for id, said in zip(prompt, event.prompt_logprobs, strict=True):
            if said is None:
                yield spell(self.asked, id, None)
            else:
                logprob, rank, top = said
                yield tell(self.asked, id, logprob, [rank], top)


def fold(answer: Answer, deltas: list[Delta]) -> list[Delta]:
    """The whole choices that deltas add up to; the best n of each prompt when more were drawn."""
    wholes = [Delta(index) for index in range(len(answer.branches))]
    for delta in deltas:
        wholes[delta.index] += delta
    asked = answer.asked
    if asked.best_of == asked.n:
        return wholes
    best: list[Delta] = []
    for at in range(0, len(wholes), asked.best_of):
        drawn = sorted(wholes[at : at + asked.best_of], key=lambda one: -_mean(answer, one))
        best += drawn[: asked.n]
    for index, whole in enumerate(best):
        whole.index = index
    return best


def _mean(answer: Answer, whole: Delta) -> float:
    """Log-probability per token, by which best_of chooses."""
    branch = answer.branches[whole.index]
    return branch.logprob / max(1, branch.length)
