"""How an answer looks on the wire: OpenAI's completion and chat objects, whole and in chunks."""

from typing import Any

import msgspec

from server.api.answer import Answer, Delta, Token

Json = dict[str, Any]
MARK = "\0text\0"  # stands for a text, and nothing before it does
encode = msgspec.json.Encoder().encode


class Shape:
    """What both objects share. Fields that OpenAI does not know come last, and only when asked."""

    whole = "text_completion"
    part = "text_completion"

    def __init__(self, answer: Answer, created: int) -> None:
        self.answer = answer
        self.asked = answer.asked
        self.options = answer.asked.body.stream_options
        served = answer.asked.served
        self._head = {"id": answer.asked.id, "created": created, "model": served.name}
        self._print = {"system_fingerprint": served.fingerprint}
        self._warn = answer.asked.warnings
        self._moulds: dict[int, tuple[bytes, bytes]] = {}  # of each choice: before its text, after

    def answer_body(self, wholes: list[Delta]) -> Json:
        choices = [self.choice(whole) for whole in wholes]
        usage = {"usage": self.answer.usage.body()}
        return self._body(self.whole, choices) | usage | self._once(wholes[0])

    def chunk(self, delta: Delta) -> bytes:
        """One choice's news, as an SSE event."""
        return self.word(delta.index, delta.text) if delta.plain else self._chunk(delta)

    def word(self, index: int, text: str) -> bytes:
        """The event of text alone, which most are: nothing else in it changes."""
        if self.options and self.options.continuous_usage_stats:
            return self._chunk(Delta(index, text))
        before, after = self._moulds.get(index) or self._mould(index)
        return before + encode(text) + after

    def _mould(self, index: int) -> tuple[bytes, bytes]:
        before, _, after = self._chunk(Delta(index, MARK)).partition(encode(MARK))
        return self._moulds.setdefault(index, (before, after))

    def _chunk(self, delta: Delta) -> bytes:
        body = self._body(self.part, [self.choice_chunk(delta)])
        if self.options and self.options.continuous_usage_stats:
            body["usage"] = self.answer.usage.body()
        elif self.options and self.options.include_usage:
            body["usage"] = None
        return event(body | self._once(delta) if delta.first else body)

    def last(self) -> bytes:
        """What ends a stream that went well."""
        if not (self.options and self.options.include_usage):
            return b"data: [DONE]\n\n"
        return event(self._body(self.part, []) | {"usage": self.answer.usage.body()}) + (
            b"data: [DONE]\n\n"
        )

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {**self._head, "object": kind, "choices": choices, **self._print}

    def _once(self, delta: Delta) -> Json:  # noqa: ARG002
        """What is said beside the first choice only."""
        warned, self._warn = self._warn, []
        return {"warnings": warned} if warned else {}

    def choice(self, delta: Delta) -> Json:
        raise NotImplementedError

    def choice_chunk(self, delta: Delta) -> Json:
        raise NotImplementedError

    def _more(self, delta: Delta) -> Json:
        """Extensions of one choice."""
        made: Json = {}
        if delta.stop is not None:
            made["stop_reason"] = delta.stop
        if delta.beam is not None:
            made["beam"] = delta.beam
        if self.asked.body.return_token_ids:
            made["token_ids"] = delta.ids
        return made

    def _prompt(self, delta: Delta) -> Json:
        """Extensions that tell of the prompt."""
        number = delta.index // self.asked.n
        made: Json = {}
        if self.asked.body.prompt_logprobs is not None:
            told = self.answer.prompt_tokens[number]
            most = self.asked.body.prompt_logprobs
            made["prompt_logprobs"] = told and [prompt_entry(token, most) for token in told]
        if self.asked.body.return_token_ids:
            made["prompt_token_ids"] = self.asked.prompts[number].ids
        return made


class CompletionShape(Shape):
    def choice(self, delta: Delta) -> Json:
        made: Json = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": delta.finish,
            **self._more(delta),
        }
        return made | self._prompt(delta)

    def choice_chunk(self, delta: Delta) -> Json:
        made: Json = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.tokens) if delta.tokens else None,
            "finish_reason": delta.finish,
            **self._more(delta),
        }
        return made | self._prompt(delta) if delta.first else made

    def _logprobs(self, tokens: list[Token]) -> Json | None:
        if self.asked.top is None:
            return None
        listed = [self._rivals(token) for token in tokens] if self.asked.top else None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": listed,
            "text_offset": [token.offset for token in tokens],
        }

    def _rivals(self, token: Token) -> dict[str, float | None] | None:
        """The best by their text; of two with one text, the better."""
        if token.logprob is None:
            return None
        made: dict[str, float | None] = {}
        for one in [*(token.top or [])[: self.asked.top], token]:
            made.setdefault(one.text, one.logprob)
        return made


class ChatShape(Shape):
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def _once(self, delta: Delta) -> Json:
        asked = "service_tier" in self.asked.body.model_fields_set
        return (
            super()._once(delta)
            | self._prompt(delta)
            | ({"service_tier": "default"} if asked else {})
        )

    def choice(self, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {
            "index": delta.index,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish,
            **self._more(delta),
        }

    def choice_chunk(self, delta: Delta) -> Json:
        news: Json = {"role": "assistant"} if delta.first else {}
        if delta.text or delta.first:
            news["content"] = delta.text
        return {
            "index": delta.index,
            "delta": news,
            "logprobs": self._logprobs(delta) if delta.tokens else None,
            "finish_reason": delta.finish,
            **self._more(delta),
        }

    def _logprobs(self, delta: Delta) -> Json | None:
        """Joined, the bytes are the content: what has no text there is not listed."""
        if self.asked.top is None:
            return None
        special = set(self.asked.served.words.special.values())
        hidden = special | set(self.asked.requests[0].eos)
        if not self.asked.body.skip_special_tokens:
            hidden = set(self.asked.requests[0].eos)
        shown = [token for token in delta.tokens if token.id not in hidden]
        return {"content": [entry(token, self.asked.top) for token in shown], "refusal": None}


def entry(token: Token, most: int) -> Json:
    rivals = [_spelled(one) for one in (token.top or [])[:most]]
    return _spelled(token) | {"top_logprobs": rivals}


def _spelled(token: Token) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def prompt_entry(token: Token, most: int) -> Json | None:
    """vLLM's shape: the token and its best rivals, by id."""
    if token.logprob is None:
        return None
    made = {str(token.id): _ranked(token, token.rank)}
    for rank, one in enumerate((token.top or [])[:most], 1):
        made.setdefault(str(one.id), _ranked(one, rank))
    return made


def _ranked(token: Token, rank: int) -> Json:
    return {"logprob": token.logprob, "rank": rank, "decoded_token": token.text}


def event(body: Json) -> bytes:
    return b"data: " + encode(body) + b"\n\n"
