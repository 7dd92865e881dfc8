"""OpenAI's own client, unmodified, against the real listener: sync, async, streamed."""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.rig import Rig, running


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def client(rig: Rig) -> Iterator[Any]:
    with OpenAI(base_url=rig.url + "/v1", api_key="x", max_retries=0) as made:
        yield made


def test_a_completion(client: Any) -> None:
    got = client.completions.create(model="tiny", prompt="Hello", max_tokens=20)
    assert got.object == "text_completion"
    assert got.model == "tiny"
    assert got.id.startswith("cmpl-")
    assert got._request_id
    assert got.choices[0].finish_reason == "length"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (6, 20)
    assert got.usage.total_tokens == 26


def test_a_stream_adds_up_to_the_whole(client: Any, rig: Rig) -> None:
    """T73: characters of several tokens, and a limit that cuts one in the middle."""
    for burst in (1, 3):
        rig.engine.burst = burst
        for tokens in (1, 2, 33, 90, 91, 92):
            ask = {"model": "tiny", "prompt": "Hi", "max_tokens": tokens, "temperature": 0}
            whole = client.completions.create(**ask)
            parts = list(client.completions.create(**ask, stream=True))
            assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
            assert [p.choices[0].finish_reason for p in parts if p.choices[0].finish_reason] == [
                "length"
            ]
            assert len({p.id for p in parts}) == 1
            assert all(p.usage is None for p in parts)
    rig.engine.burst = 1


def test_usage_in_a_stream(client: Any) -> None:
    parts = list(
        client.completions.create(
            model="tiny",
            prompt="Hi",
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == 5
    assert all(len(part.choices) == 1 and part.usage is None for part in parts[:-1])


def test_a_chat(client: Any) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=12
    )
    assert got.object == "chat.completion"
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content
    assert got.choices[0].finish_reason == "length"


def test_a_chat_stream(client: Any) -> None:
    ask = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "max_tokens": 40,
        "temperature": 0,
        "n": 2,
    }
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True))
    for index in range(2):
        own = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(one.delta.role is None for one in own[1:])
        text = "".join(one.delta.content or "" for one in own)
        assert text == whole.choices[index].message.content
        assert sum(one.finish_reason is not None for one in own) == 1


def test_logprobs_of_a_chat(client: Any) -> None:
    ask = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "träd"}],
        "max_tokens": 60,
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0,
    }
    got = client.chat.completions.create(**ask).choices[0]
    entries = got.logprobs.content
    assert len(entries) == 60
    joined = b"".join(bytes(entry.bytes) for entry in entries)
    assert joined.decode("utf-8", "replace") == got.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(e.top_logprobs[0].logprob >= e.top_logprobs[1].logprob for e in entries)
    parts = client.chat.completions.create(**ask, stream=True)
    streamed = [e for p in parts if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    assert streamed == entries


def test_logprobs_of_a_completion(client: Any) -> None:
    got = client.completions.create(
        model="tiny", prompt="träd", max_tokens=50, logprobs=2, temperature=0
    ).choices[0]
    told = got.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 50
    for token, value, top, at in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        assert top[token] == value
        if not token.startswith("bytes:"):
            assert got.text[at : at + len(token)] == token


def test_echo_with_logprobs(client: Any, rig: Rig) -> None:
    got = client.completions.create(
        model="tiny", prompt="hej", max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    choice = got.choices[0]
    assert choice.text.startswith("hej")
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.tokens == ["<bos>", "h", "e", "j", choice.text[3:]]
    for value, top in list(
        zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    )[1:]:
        assert value == max(top.values())
    none = client.completions.create(model="tiny", prompt="hej", max_tokens=0, echo=True)
    assert none.choices[0].text == "hej"
    assert none.choices[0].finish_reason == "length"


def test_many_prompts_and_choices(client: Any) -> None:
    prompts = ["a", "bb", "ccc"]
    create = partial(client.completions.create, model="tiny", max_tokens=8, temperature=0)
    got = create(prompt=prompts, n=2)
    assert [choice.index for choice in got.choices] == list(range(6))
    alone = [
        client.completions.create(model="tiny", prompt=p, max_tokens=8, temperature=0)
        for p in prompts
    ]
    assert [c.text for c in got.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert got.usage.prompt_tokens == 2 + 3 + 4
    assert got.usage.completion_tokens == 48
    assert len(create(prompt=[[97], [98, 98]]).choices) == 2
    streamed: dict[int, str] = {}
    for part in create(prompt=prompts, n=2, stream=True):
        index = part.choices[0].index
        streamed[index] = streamed.get(index, "") + part.choices[0].text
    assert [streamed[i] for i in range(6)] == [choice.text for choice in got.choices]


def test_stop_strings_cut_text_and_logprobs(client: Any) -> None:
    """T74"""
    ask = {"model": "tiny", "prompt": "Hi", "max_tokens": 200, "temperature": 0, "logprobs": 0}
    free = client.completions.create(**ask).choices[0]
    stop = free.text[30:36]
    got = client.completions.create(**ask, stop=stop).choices[0]
    assert got.text == free.text[:30]
    assert got.finish_reason == "stop"
    assert "".join(got.logprobs.tokens) == got.text
    parts = client.completions.create(**ask, stop=stop, stream=True)
    choices = [part.choices[0] for part in parts]
    assert "".join(choice.text for choice in choices) == got.text
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
    assert told == got.logprobs.tokens


def test_best_of_gives_the_likeliest(client: Any, rig: Rig) -> None:
    got = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=6, n=2, best_of=5, seed=3, logprobs=0
    )
    assert rig.engine.seen[-1].n == 5
    sums = [sum(v for v in c.logprobs.token_logprobs if v) for c in got.choices if c.logprobs]
    every = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=6, n=5, seed=3, logprobs=0
    )
    rest = [sum(v for v in c.logprobs.token_logprobs if v) for c in every.choices if c.logprobs]
    assert sums == sorted(rest, reverse=True)[:2]
    assert got.usage.completion_tokens == 30


def test_embeddings(client: Any) -> None:
    got = client.embeddings.create(model="tiny", input=["one", "two"])
    assert [len(one.embedding) for one in got.data] == [8, 8]
    assert sum(x * x for x in got.data[0].embedding) == pytest.approx(1, abs=1e-6)
    plain = client.embeddings.create(model="tiny", input="one", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-6)
    assert got.usage.prompt_tokens == 8


def test_models(client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b/../c")


def test_errors_are_the_sdks(client: Any, rig: Rig) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in long.value.message
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="tiny", prompt="x", extra_body={"temprature": 1})
    assert "did you mean 'temperature'" in unknown.value.message
    rig.engine.fail_at, rig.engine.code = 0, "queue_full"
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="tiny", prompt="x")
    assert full.value.response.headers["retry-after"] == "1"
    rig.engine.fail_at, rig.engine.code = 3, "engine_down"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x")
    stream = client.completions.create(model="tiny", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="engine died"):
        for _ in stream:
            pass
    rig.engine.fail_at = None


def test_the_async_client(rig: Rig) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=rig.url + "/v1", api_key="x", max_retries=0) as client:
            whole = await client.completions.create(
                model="tiny", prompt="Hi", max_tokens=30, temperature=0
            )
            streams = [_collect(client) for _ in range(50)]
            assert set(await asyncio.gather(*streams)) == {whole.choices[0].text}

    asyncio.run(main())


async def _collect(client: AsyncOpenAI) -> str:
    stream = await client.completions.create(
        model="tiny", prompt="Hi", max_tokens=30, temperature=0, stream=True
    )
    return "".join([part.choices[0].text async for part in stream])
