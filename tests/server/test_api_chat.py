"""From messages to the prompt that the model reads."""

import dataclasses
from typing import Any

import pytest

from model.chat import ChatTemplate
from server.api.fields import Bounds, parse
from server.api.prompt import chat_prompt
from server.api.schema import NOT_SERVED, ChatBody
from server.api.served import Served
from server.config import Settings
from server.errors import InvalidField, KvistError, UnsupportedField
from tests.server.fakes import FakeTemplate
from tests.server.rig import served

HERE = served(Settings())


def text(messages: list[Any], served: Served = HERE, **fields: Any) -> str:
    body = {"messages": messages} | fields
    bounds = Bounds(HERE.limits, HERE.vocabulary)
    made = parse(ChatBody, body, bounds, NOT_SERVED[ChatBody])[0]
    return chat_prompt(served, made).text


def chat_ids(messages: list[Any], served: Served) -> list[int]:
    bounds = Bounds(HERE.limits, HERE.vocabulary)
    return chat_prompt(served, parse(ChatBody, {"messages": messages}, bounds, {})[0]).ids


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_contents() -> None:
    assert text([user("Hi")]) == "<|im|>user: Hi\n<|im|>assistant: "
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text([user(parts)]) == "<|im|>user: a\nb\n<|im|>assistant: "
    assert text([user("Hi")], add_generation_prompt=False) == "<|im|>user: Hi\n"


def test_roles_and_calls_of_real_clients() -> None:
    """pydantic-ai sends content null beside tool calls; instructor wants arguments as JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    seen: list[Any] = []

    class Spy(FakeTemplate):
        def render_ids(
            self, tokenizer: Any, messages: list[dict[str, Any]], /, *args: Any, **more: Any
        ) -> tuple[str, list[int]]:
            seen.extend(messages)
            return "x", [1]

    messages = [
        {"role": "developer", "content": "Be brief."},
        user("Hi"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    text(messages, dataclasses.replace(HERE, template=Spy()))
    assert [one["role"] for one in seen] == ["system", "user", "assistant", "tool"]
    assert seen[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_the_last_message_goes_on() -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Well, "}]
    got = text(messages, continue_final_message=True)
    assert got == "<|im|>user: Hi\n<|im|>assistant: Well, "
    with pytest.raises(InvalidField, match="exclude"):
        text(messages, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([user(None)], "messages[0].content"),
        ([user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])], "[0]"),
        ([user([{"type": "text"}])], "messages[0].content[0]"),
        ([user([1])], "messages[0].content"),
        ([user("x") | {"colour": "red"}], "messages[0].colour"),
        ([user("x") | {"tool_calls": [{}]}], "messages[0].tool_calls"),
        ("Hi", "messages"),
        ([user("x")] * 5000, "messages"),
    ],
)
def test_messages_that_are_refused(messages: Any, param: str) -> None:
    """T40: what is no text is refused, never fetched."""
    with pytest.raises(KvistError) as refused:
        text(messages)
    assert refused.value.status == 400
    assert param in (refused.value.param or "")


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(UnsupportedField, match="--chat-template"):
        text([user("x")], dataclasses.replace(HERE, template=None))


def test_templates_of_a_request_and_their_variables_are_kept_out() -> None:
    """T11"""
    with pytest.raises(UnsupportedField, match="chat_template"):
        text([user("x")], chat_template="{{ 1 }}")


def test_the_real_templates() -> None:
    """T11, T12: variables are the template's own, and special tokens of users are plain text."""
    source = "{% for m in messages %}<|im|>{{ m.content }}{% endfor %}{{ mood }}"
    real = dataclasses.replace(HERE, template=ChatTemplate(source, {"eos_token": "<eos>"}))
    assert text([user("Hi")], real, chat_template_kwargs={"mood": "!"}) == "<|im|>Hi!"
    assert chat_ids([user("a<eos>")], real) == [258, *b"a<eos>"]
    for taken in ("messages", "eos_token", "raise_exception"):
        with pytest.raises(InvalidField, match="refuses"):
            text([user("x")], real, chat_template_kwargs={taken: "x"})
    refusing = ChatTemplate("{{ raise_exception('Roles must alternate') }}", {})
    with pytest.raises(InvalidField, match="refuses these messages: Roles must alternate"):
        text([user("x")], dataclasses.replace(HERE, template=refusing))
    endless = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        {},
        seconds=0.1,
    )
    with pytest.raises(InvalidField, match="refuses these messages"):
        text([user("x")], dataclasses.replace(HERE, template=endless))


def test_a_template_that_refuses_is_a_400_without_its_insides() -> None:
    class Broken(FakeTemplate):
        def render_ids(
            self, tokenizer: Any, messages: list[dict[str, Any]], /, *args: Any, **more: Any
        ) -> tuple[str, list[int]]:
            raise ValueError("/secret/path")

    with pytest.raises(InvalidField, match="refuses these messages") as refused:
        text([user("x")], dataclasses.replace(HERE, template=Broken()))
    assert "secret" not in refused.value.message
