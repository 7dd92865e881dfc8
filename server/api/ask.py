"""From a checked body to the engine's requests, and what the answer must show of them."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from model.sampling import Sampling
from server.api import beams
from server.api.prompt import Prompt, chat_prompt, completion_prompts, room
from server.api.schema import ChatBody, CompletionBody, Sampled
from server.api.served import Served
from server.engine.request import Beams, Request
from server.errors import InvalidField, LimitExceeded, UnsupportedField

SEEDS = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One call of a route: a request a prompt, and how the answer looks."""

    id: str
    served: Served
    body: Sampled
    prompts: list[Prompt]
    requests: list[Request]
    n: int  # choices a prompt, in the answer
    best_of: int  # of so many branches
    top: int | None  # alternatives beside each token; None: no log-probabilities
    echo: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def beams(self) -> Beams | None:
        return self.requests[0].beams


def completion(served: Served, body: CompletionBody, name: str, salt: str) -> Asked:
    """`name` is the answer's id; `salt` parts the caches of keys."""
    served.check_name(body.model)
    width = _width(served, body, len(body.prompt))
    if body.max_tokens == 0 and not body.echo:
        raise InvalidField("'max_tokens' may be 0 only with 'echo'.", "max_tokens")
    if body.echo and body.suffix is not None:
        raise InvalidField("'echo' and 'suffix' exclude each other.", "echo")
    sent = body.max_tokens if "max_tokens" in body.model_fields_set else None
    prompts = completion_prompts(served, body)
    rooms = [room(served, prompt, sent, 16, width) for prompt in prompts]
    return _asked(served, body, name, salt, prompts, rooms, body.logprobs, body.echo)


def chat(served: Served, body: ChatBody, name: str, salt: str) -> Asked:
    served.check_name(body.model)
    width = _width(served, body, 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidField("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    both = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(both) > 1:
        raise InvalidField("'max_tokens' and 'max_completion_tokens' differ.", "max_tokens")
    prompt = chat_prompt(served, body)
    top = (body.top_logprobs or 0) if body.logprobs else None
    rooms = [room(served, prompt, next(iter(both), None), None, width)]
    return _asked(served, body, name, salt, [prompt], rooms, top, False)


def _width(served: Served, body: Sampled, prompts: int) -> int:
    """The branches of each prompt; checked before anything is tokenised."""
    wide = beams.width(body) or max(beams.choices(body), body.best_of or 1)
    most = served.limits.branches
    if prompts * wide > most:
        said = f"{prompts} prompts with {wide} branches each are more than {most} branches."
        raise LimitExceeded(said, "n" if prompts == 1 else "prompt")
    if body.stream_options is not None and not body.stream:
        raise InvalidField("'stream_options' needs 'stream': true.", "stream_options")
    return wide


def _asked(
    served: Served,
    body: Sampled,
    name: str,
    salt: str,
    prompts: list[Prompt],
    rooms: list[int],
    top: int | None,
    echo: bool,
) -> Asked:
    ends = () if body.ignore_eos else served.eos
    search, warnings = beams.beams(served, body, len({*ends, *body.stop_token_ids}))
    n, best_of = beams.choices(body), _best_of(body, search)
    shared: dict[str, Any] = {
        "n": n if search else best_of,
        "beams": search,
        "stop": tuple(body.stop),
        "eos": ends,
        "include_stop": body.include_stop_str_in_output,
        "skip_special": body.skip_special_tokens,
        "logprobs": top if top is not None or best_of == n else 0,
        "prompt_logprobs": _prompt_logprobs(body, top if echo else None),
        "priority": body.priority,
        "deadline": served.limits.request_timeout,
        "queue_timeout": served.limits.queue_timeout,
        "cache_salt": f"{salt}:{body.cache_salt}" if salt or body.cache_salt else "",
    }
    greedy = beams.width(body) is not None and not body.beam_sample
    requests = [
        Request(
            id=f"{name}-{number}",
            prompt=prompt.ids,
            max_tokens=tokens,
            sampling=sampling(served, body, tokens, greedy),
            **shared,
        )
        for number, (prompt, tokens) in enumerate(zip(prompts, rooms, strict=True))
    ]
    return Asked(
        id=name,
        served=served,
        body=body,
        prompts=prompts,
        requests=requests,
        n=n,
        best_of=best_of,
        top=top,
        echo=echo,
        warnings=warnings,
    )


def _best_of(body: Sampled, search: Beams | None) -> int:
    """How many branches are drawn for the best n; beams pick their best themselves."""
    n = beams.choices(body)
    if search or body.best_of is None:
        return n
    if body.best_of < n:
        raise InvalidField(f"'best_of' is {body.best_of}, but must be at least n = {n}.", "best_of")
    if body.best_of > n and body.stream:
        raise UnsupportedField("'best_of' cannot stream: the best is known at the end.", "best_of")
    return body.best_of


def _prompt_logprobs(body: Sampled, echoed: int | None) -> int | None:
    said = [k for k in (body.prompt_logprobs, echoed) if k is not None]
    return max(said, default=None)


def sampling(served: Served, body: Sampled, tokens: int, greedy: bool) -> Sampling:
    """How successors are chosen."""
    if body.min_tokens > tokens:
        said = f"'min_tokens' is {body.min_tokens}, but at most {tokens} tokens are made."
        raise InvalidField(said, "min_tokens")
    ends = () if body.ignore_eos else served.eos
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    return Sampling(
        temperature=0.0 if greedy else body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        typical_p=body.typical_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=_logit_bias(served, body.logit_bias),
        bad_words=_bad_words(served, body.bad_words),
        allowed=tuple(sorted(set(body.allowed_token_ids or ()))),
        min_tokens=body.min_tokens,
        stops=tuple(sorted({*ends, *body.stop_token_ids})),
        seed=seed & SEEDS,
    )


def _logit_bias(served: Served, said: dict[str, float]) -> dict[int, float]:
    made: dict[int, float] = {}
    for text, bias in said.items():
        short = text.isascii() and text.isdecimal() and len(text) < 12
        if not short or int(text) >= served.vocabulary:
            ids = f"0 … {served.vocabulary - 1}"
            wrong = f"'logit_bias' has the key {text[:60]!r}, but this model's ids are {ids}."
            raise InvalidField(wrong, "logit_bias")
        if not -100 <= bias <= 100:
            raise InvalidField(f"'logit_bias' has {bias}, outside -100 … 100.", "logit_bias")
        made[int(text)] = bias
    return made


def _bad_words(served: Served, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Each word at the start of a text, and after a space."""
    encode = served.words.encode
    spelled = [encode(space + word, bos=False) for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(tuple(ids) for ids in spelled if ids))
