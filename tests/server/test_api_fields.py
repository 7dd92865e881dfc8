"""Every field of OpenAI's client is honoured or refused, and nothing at all is ignored."""

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat

from model.sampling import Sampling
from server.api import ask
from server.api.fields import Bounds, parse
from server.api.schema import (
    NOT_SERVED,
    BeamStream,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    Sampled,
    StreamOptions,
    Strict,
)
from server.config import Settings
from server.engine.request import Beams, Request
from server.errors import (
    InvalidField,
    KvistError,
    LimitExceeded,
    MissingField,
    ModelNotFound,
    TooLong,
    UnknownField,
    UnsupportedField,
)
from tests.server.fakes import EOS
from tests.server.rig import served

HERE = served(Settings())
MESSAGES = [{"role": "user", "content": "Hi"}]


def completion(_lenient: bool = False, **fields: Any) -> ask.Asked:
    body, warnings = parse(
        CompletionBody,
        {"prompt": "Hi"} | fields,
        Bounds(HERE.limits, HERE.vocabulary),
        NOT_SERVED[CompletionBody],
        _lenient,
    )
    made = ask.completion(HERE, body, "id", "")
    made.warnings.extend(warnings)
    return made


def chats(**fields: Any) -> ask.Asked:
    bounds = Bounds(HERE.limits, HERE.vocabulary)
    body, _ = parse(ChatBody, {"messages": MESSAGES} | fields, bounds, NOT_SERVED[ChatBody])
    return ask.chat(HERE, body, "id", "")


def request(**fields: Any) -> Request:
    return completion(**fields).requests[0]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (CompletionBody, completion_create_params.CompletionCreateParamsStreaming),
        (CompletionBody, completion_create_params.CompletionCreateParamsNonStreaming),
        (ChatBody, chat.CompletionCreateParamsStreaming),
        (ChatBody, chat.CompletionCreateParamsNonStreaming),
        (EmbeddingBody, embedding_create_params.EmbeddingCreateParams),
        (StreamOptions, chat_completion_stream_options_param.ChatCompletionStreamOptionsParam),
    ],
)
def test_every_field_of_the_sdk_is_known(kind: type[Strict], params: Any) -> None:
    """A field that a new SDK brings turns up here before a client sends it."""
    known = set(kind.model_fields) | set(NOT_SERVED.get(kind, {}))
    assert set(get_type_hints(params)) - known == set()


def test_every_field_is_honoured_somewhere() -> None:
    """Each field that decides what is generated changes the request when it is sent."""
    plain = request(seed=1)
    values: dict[str, Any] = {
        "n": 2, "temperature": 0.5, "top_p": 0.5, "frequency_penalty": 1, "presence_penalty": 1,
        "logit_bias": {"5": 1}, "seed": 2, "stop": "x", "top_k": 3, "min_p": 0.1, "typical_p": 0.5,
        "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [7],
        "bad_words": ["no"], "allowed_token_ids": [3, 4], "prompt_logprobs": 1, "priority": 5,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "cache_salt": "s",
        "truncate_prompt_tokens": 1, "use_beam_search": True, "beam_width": 3, "num_beams": 3,
        "num_return_sequences": 2, "best_of": 2, "max_tokens": 3, "logprobs": 2, "echo": None,
        "add_special_tokens": False,
    }  # fmt: skip
    elsewhere = {  # in the answer, in other tests of this file, or in no way but to be checked
        "model", "prompt", "echo", "stream", "stream_options", "user", "suffix", "strict",
        "return_token_ids",
    }  # fmt: skip
    beams = {
        "length_penalty": 0.5, "early_stopping": True, "num_beam_groups": 2, "exact_exit": False,
        "diversity_penalty": 0.5, "beam_sample": True, "beam_stream": {"mode": "final"},
    }  # fmt: skip
    assert set(values) | elsewhere | set(beams) == set(CompletionBody.model_fields)
    for name, value in values.items():
        if value is not None:
            assert request(**{"seed": 1, name: value}) != plain, name
    search = request(seed=1, num_beams=4)
    for name, value in beams.items():
        assert request(**{"seed": 1, "num_beams": 4, name: value}) != search, name


def test_what_a_field_becomes() -> None:
    made = request(
        n=2, temperature=0.5, top_k=-1, stop=["a", "b"], stop_token_ids=[7, 7],
        logit_bias={"5": -2}, bad_words=["no"], max_tokens=9, seed=-1, priority=-3,
        logprobs=2, min_tokens=1,
    )  # fmt: skip
    assert made.sampling == Sampling(
        temperature=0.5,
        stops=(7, EOS),
        logit_bias={5: -2.0},
        bad_words=((110, 111), (32, 110, 111)),
        seed=(1 << 63) - 1,
        min_tokens=1,
    )
    assert (made.n, made.stop, made.eos, made.max_tokens) == (2, ("a", "b"), (EOS,), 9)
    assert (made.priority, made.logprobs, made.deadline) == (-3, 2, 600.0)
    assert request(ignore_eos=True, stop_token_ids=[7]).sampling.stops == (7,)
    assert request(ignore_eos=True).eos == ()


def test_null_is_not_sent() -> None:
    """LangChain sends nulls for what it does not mean."""
    nothing = dict.fromkeys(set(CompletionBody.model_fields) - {"prompt", "seed"})
    assert request(**nothing, seed=1) == request(seed=1)
    plain = dict.fromkeys(set(ChatBody.model_fields) - {"messages", "seed"})
    refused = dict.fromkeys(NOT_SERVED[ChatBody])
    assert chats(**plain, **refused, seed=1).requests == chats(seed=1).requests
    assert request(prompt=None).prompt == request(prompt="").prompt


def test_seeds_differ_unless_they_are_given() -> None:
    assert request().sampling.seed != request().sampling.seed
    assert request(seed=5).sampling.seed == request(seed=5).sampling.seed == 5


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_what_is_not_served_is_said(kind: type[Sampled]) -> None:
    make: Any = completion if kind is CompletionBody else chats
    for name, (neutral, _) in NOT_SERVED[kind].items():
        with pytest.raises(UnsupportedField, match=name) as refused:
            make(**{name: {"type": "json_object"}})
        assert refused.value.param == name
        for value in neutral:
            assert name not in make(**{name: value}).body.model_fields_set


@pytest.mark.parametrize(
    ("fields", "error", "param", "says"),
    [
        # T01
        ({"n": 10**9}, LimitExceeded, "n", "most here is 128"),
        ({"n": -1}, InvalidField, "n", "at least 1"),
        ({"n": 0}, InvalidField, "n", "at least 1"),
        ({"n": 1.5}, InvalidField, "n", "whole number"),
        ({"n": True}, InvalidField, "n", "whole number"),
        ({"n": 10**400}, LimitExceeded, "n", "most here"),
        ({"best_of": 10**9}, LimitExceeded, "best_of", "most here"),
        ({"best_of": 1, "n": 2}, InvalidField, "best_of", "at least n"),
        ({"best_of": 3, "stream": True}, UnsupportedField, "best_of", "cannot stream"),
        ({"num_beams": 10**9}, LimitExceeded, "num_beams", "most here is 16"),
        ({"use_beam_search": True, "best_of": 99}, LimitExceeded, "beam_width", "16"),
        # T02
        ({"prompt": ["x"] * 200_000}, LimitExceeded, "prompt", "most is 128"),
        ({"prompt": ["x"] * 100, "n": 100}, LimitExceeded, "prompt", "1024 branches"),
        # T03
        ({"stop": ["x"] * 100_000}, LimitExceeded, "stop", "most here is 4"),
        ({"stop": "x" * 10**6}, LimitExceeded, "stop", "256 bytes"),
        ({"bad_words": ["x"] * 50_000}, LimitExceeded, "bad_words", "most here"),
        ({"logit_bias": {str(i): 1 for i in range(300_000)}}, LimitExceeded, "logit_bias", "most"),
        # T04
        *[
            ({name: value}, InvalidField, name, r"0 … 258")
            for bad in (-1, 259, 2**31, 2**63, 10**30)
            for name, value in (
                ("prompt", [bad]),
                ("prompt", [[1], [bad]]),
                ("stop_token_ids", [bad]),
                ("allowed_token_ids", [bad]),
                ("logit_bias", {str(bad): 1}),
            )
        ],
        # T05
        ({"logprobs": 10**9}, LimitExceeded, "logprobs", "most here is 20"),
        ({"logprobs": -1}, InvalidField, "logprobs", "at least 0"),
        ({"prompt_logprobs": 259}, LimitExceeded, "prompt_logprobs", "most here"),
        # others
        ({"temperature": 3}, InvalidField, "temperature", "at most 2"),
        ({"temperature": "hot"}, InvalidField, "temperature", "a number, but is 'hot'"),
        ({"top_p": 0}, InvalidField, "top_p", "more than 0"),
        ({"stream": "yes"}, InvalidField, "stream", "true or false"),
        ({"stop": [1]}, InvalidField, "stop[0]", "a string"),
        ({"stop": ""}, InvalidField, "stop", "empty"),
        ({"seed": 2**63}, InvalidField, "seed", "less than"),
        ({"max_tokens": 0}, InvalidField, "max_tokens", "echo"),
        ({"max_tokens": -1}, InvalidField, "max_tokens", "at least 0"),
        ({"max_tokens": 4096}, TooLong, "max_tokens", "maximum context length is 4096 tokens"),
        ({"min_tokens": 17}, InvalidField, "min_tokens", "at most 16"),
        ({"prompt": []}, InvalidField, "prompt", "it is empty"),
        ({"prompt": [[]]}, InvalidField, "prompt", "no tokens"),
        ({"prompt": ["a", 1]}, InvalidField, "prompt", "mixes"),
        ({"prompt": [1, "a"]}, InvalidField, "prompt", "mixes"),
        ({"prompt": [[True]]}, InvalidField, "prompt", "mixes"),
        ({"prompt": 7}, InvalidField, "prompt", "it is 7"),
        ({"suffix": "x"}, UnsupportedField, "suffix", "fill in the middle"),
        ({"model": "gpt"}, ModelNotFound, "model", "'tiny'"),
        ({"temprature": 1}, UnknownField, "temprature", "did you mean 'temperature'"),
        ({"x" * 10**6: 1}, UnknownField, None, "no field"),
        ({"stream_options": {}}, InvalidField, "stream_options", "stream"),
        ({"stream_options": {"x": 1}, "stream": True}, UnknownField, "stream_options.x", "no"),
        ({"logit_bias": {"a": 1}}, InvalidField, "logit_bias", "0 … 258"),
        ({"logit_bias": {"1": 101}}, InvalidField, "logit_bias", "-100"),
        ({"logit_bias": {"1": "x"}}, InvalidField, "logit_bias.1", "a number"),
        ({"stop": 5}, InvalidField, "stop", "a list"),
        ({"allowed_token_ids": []}, InvalidField, "allowed_token_ids", "1 or more entries"),
        # beams
        ({"num_beams": 2, "n": 3}, InvalidField, "n", "only 2 beams"),
        ({"num_beams": 2, "beam_width": 3}, InvalidField, "beam_width", "mean the same"),
        ({"n": 2, "num_return_sequences": 3}, InvalidField, "n", "mean the same"),
        ({"num_beams": 2, "use_beam_search": False}, InvalidField, "use_beam_search", "false"),
        ({"length_penalty": 1}, InvalidField, "length_penalty", "needs a beam search"),
        ({"num_beams": 4, "num_beam_groups": 3}, InvalidField, "num_beam_groups", "equal groups"),
        ({"num_beams": 4, "best_of": 5}, InvalidField, "best_of", "4 beams"),
        ({"num_beams": 2, "temperature": 1, "strict": True}, InvalidField, "temperature", "effect"),
        ({"early_stopping": "soon", "num_beams": 2}, InvalidField, "early_stopping", "must be"),
    ],
)  # fmt: skip
def test_refused_with_a_sentence(
    fields: dict[str, Any], error: type[KvistError], param: str | None, says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        completion(**fields)
    assert type(refused.value) is error
    assert param is None or refused.value.param == param
    assert len(refused.value.message) < 400
    assert "pydantic" not in refused.value.message.lower()


def test_the_prompt_is_required() -> None:
    with pytest.raises(MissingField, match="'prompt' is missing"):
        parse(CompletionBody, {}, Bounds(HERE.limits, 9), {})


def test_lenient_warns_of_what_is_unknown_and_of_nothing_else() -> None:
    made = completion(_lenient=True, temprature=1, stream_options={"a": 1}, stream=True)
    assert len(made.warnings) == 2
    assert any("did you mean 'temperature'" in said for said in made.warnings)
    with pytest.raises(InvalidField):
        completion(_lenient=True, temperature=9)
    many = completion(_lenient=True, **{f"x{i}": i for i in range(5000)})
    assert len(many.warnings) == 16


def test_beams_in_every_dialect() -> None:
    """transformers', vLLM's and our own names."""
    four = Beams(width=4)
    assert request(num_beams=4).beams == four
    assert request(beam_width=4).beams == four
    assert request(use_beam_search=True, n=4).beams == four
    assert request(use_beam_search=True, n=4).n == 4
    assert request(use_beam_search=True, best_of=4).beams == four
    assert request(use_beam_search=True, best_of=4).n == 1
    assert request(num_beams=4, num_return_sequences=2).n == 2
    made = request(
        num_beams=6, length_penalty=0.5, early_stopping="never", num_beam_groups=3,
        beam_sample=True, diversity_penalty=0.25, exact_exit=False,
        beam_stream={"mode": "windowed", "w": 5, "events": "tree"},
    )  # fmt: skip
    assert made.beams == Beams(
        width=6, length_penalty=0.5, early_stopping="never", groups=3, sample=True, tree=True,
        diversity_penalty=0.25, exact_exit=False, mode="windowed", window=5,
    )  # fmt: skip
    assert {x.name for x in msgspec.structs.fields(Beams)} == {
        "width", "length_penalty", "early_stopping", "exact_exit", "groups", "diversity_penalty",
        "sample", "mode", "window", "tree",
    }  # fmt: skip
    assert request(num_beams=4, temperature=0.3).sampling.temperature == 0
    assert request(num_beams=4, temperature=0.3, beam_sample=True).sampling.temperature == 0.3
    assert "no effect" in completion(num_beams=4, temperature=0.3).warnings[0]
    one = completion(use_beam_search=True, beam_width=1).requests[0]
    assert one.beams is None
    assert one.sampling.temperature == 0


def test_every_field_of_the_engines_request_is_set_or_meant_to_stay() -> None:
    """A field that the engine gets one day must be asked for here, or named here."""
    unset = {"draft"}  # the server's default
    made = completion(
        stop="a", n=2, logprobs=1, prompt_logprobs=1, priority=1, cache_salt="x", num_beams=2,
        include_stop_str_in_output=True, skip_special_tokens=False, temperature=0.5, seed=1,
    )  # fmt: skip
    for one in msgspec.structs.fields(Request):
        differs = getattr(made.requests[0], one.name) != one.default
        assert differs or one.name in unset, one.name


def test_prompts() -> None:
    assert request(prompt="hi").prompt == [257, 104, 105]
    assert request(prompt="hi", add_special_tokens=False).prompt == [104, 105]
    assert request(prompt="<eos>").prompt == [257, *b"<eos>"]  # T12
    assert request(prompt="").prompt == [257]
    assert request(prompt="abc", truncate_prompt_tokens=2).prompt == [98, 99]
    assert request(prompt="a" * 9000, truncate_prompt_tokens=-1, max_tokens=1).prompt == [97] * 4095
    several = completion(prompt=[[1, 2], [3]]).requests
    assert [one.prompt for one in several] == [[1, 2], [3]]
    assert len({one.id for one in several}) == 2


def test_room_is_what_the_context_leaves() -> None:
    assert chats().requests[0].max_tokens == 4096 - len(chats().requests[0].prompt)
    assert chats(max_tokens=5).requests[0].max_tokens == 5
    assert chats(max_completion_tokens=5, max_tokens=5).requests[0].max_tokens == 5
    assert request(prompt="x" * 4090).max_tokens == 5
    with pytest.raises(InvalidField, match="differ"):
        chats(max_completion_tokens=5, max_tokens=6)
    small = dataclasses.replace(HERE, capacity=100)
    body, _ = parse(
        CompletionBody, {"prompt": "x", "max_tokens": 100}, Bounds(HERE.limits, 259), {}
    )
    with pytest.raises(TooLong, match="KV cache holds 100 tokens"):  # T35
        ask.completion(small, body, "id", "")


def test_fill_in_the_middle() -> None:
    words = HERE.words
    words.special.update({"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3})
    try:
        assert request(prompt="a", suffix="b").prompt == [1, 97, 2, 98, 3]
        with pytest.raises(InvalidField, match="exclude"):
            request(prompt="a", suffix="b", echo=True)
    finally:
        for name in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"):
            del words.special[name]


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody, BeamStream, EmbeddingBody])
def test_no_field_takes_more_than_its_type(kind: type[Strict]) -> None:
    """Whatever the field, a value of another kind is refused with its name."""
    for name, field in kind.model_fields.items():
        hint = field.annotation
        inside = str(hint)
        wrong: Any = {"a": object} if "dict" not in inside and "Stream" not in inside else 7
        if get_origin(hint) is None and hint is bool:
            wrong = 1
        body = {"prompt": "x", "messages": MESSAGES, "input": "x"}
        body = {key: value for key, value in body.items() if key in kind.model_fields}
        with pytest.raises(KvistError) as refused:
            parse(kind, body | {name: wrong}, Bounds(HERE.limits, 259), {})
        assert (refused.value.param or "").startswith(name), (name, get_args(hint))
