"""From what a client sent to token ids, within the context."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.api.schema import ChatBody, CompletionBody, Message, Sampled, TokenizeBody
from server.api.served import Served, fill_in_tokens
from server.errors import InvalidField, MissingField, TooLong, UnsupportedField

NO_TEMPLATE = (
    "This model has no chat template. Use /v1/completions, or start the server with"
    " --chat-template and a file."
)


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str  # as echo gives it back


def completion_prompts(served: Served, body: CompletionBody) -> list[Prompt]:
    build = partial(_filled_in if body.suffix is not None else _plain, served, body)
    return [_cut(served, body, build(one)) for one in body.prompt]


def _plain(served: Served, body: CompletionBody, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, list):
        return Prompt(prompt, served.words.decode(prompt) if body.echo else "")
    ids = served.words.encode(prompt, special=False, bos=body.add_special_tokens)
    return Prompt(ids or _beginning(served), prompt)


def _beginning(served: Served) -> list[int]:
    """An empty text: the model begins a document."""
    words = served.words
    if words.bos is None and words.eos is None:
        raise InvalidField(
            "'prompt' is empty, and this model has no token to begin with.", "prompt"
        )
    return [words.bos if words.bos is not None else words.eos or 0]


def _filled_in(served: Served, body: CompletionBody, prompt: str | list[int]) -> Prompt:
    marks = fill_in_tokens(served.words)
    if marks is None:
        raise UnsupportedField("'suffix' needs a model taught to fill in the middle.", "suffix")
    before, after, middle = marks
    encode = partial(served.words.encode, special=False, bos=False)
    prefix = prompt if isinstance(prompt, list) else encode(prompt)
    ids = [before, *prefix, after, *encode(body.suffix or ""), middle]
    return Prompt(ids, prompt if isinstance(prompt, str) else served.words.decode(prompt))


def _cut(served: Served, body: Sampled, prompt: Prompt) -> Prompt:
    """The end of the prompt, when the client asks for it, and nothing is asked of no prompt."""
    if not prompt.ids:
        raise InvalidField("'prompt' has no tokens.", "prompt")
    keep = body.truncate_prompt_tokens
    if keep is None or keep == 0:
        return prompt
    most = keep if keep > 0 else served.context - 1
    if len(prompt.ids) <= most:
        return prompt
    ids = prompt.ids[-most:]
    return Prompt(ids, served.words.decode(ids))


def chat_prompt(served: Served, body: ChatBody) -> Prompt:
    text, ids = render(served, body, **body.chat_template_kwargs)
    return _cut(served, body, Prompt(ids, text))


def render(
    served: Served, body: ChatBody | TokenizeBody, **more: str | float | bool
) -> tuple[str, list[int]]:
    """The conversation as the model reads it."""
    if served.template is None:
        raise UnsupportedField(NO_TEMPLATE, "messages")
    both = body.continue_final_message and body.add_generation_prompt
    if both and "add_generation_prompt" in body.model_fields_set:
        wrong = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise InvalidField(wrong, "continue_final_message")
    messages = [_message(served, i, one) for i, one in enumerate(body.messages or [])]
    try:
        return served.template.render_ids(
            served.words,
            messages,
            add_generation_prompt=body.add_generation_prompt and not both,
            continue_final_message=body.continue_final_message,
            **more,
        )
    except (TypeError, ValueError) as error:  # its own words may be told, a library's not
        said = getattr(error, "template_message", None)
        wrong = f"The chat template refuses these messages{f': {said}' if said else '.'}"
        raise InvalidField(wrong, "messages") from None


def _message(served: Served, at: int, message: Message) -> dict[str, Any]:
    """A message as templates know it."""
    made = message.model_dump(exclude_none=True)
    made["content"] = _content(message.content, f"messages[{at}].content")
    if message.content is None and not (message.tool_calls or message.refusal):
        raise MissingField(f"'messages[{at}].content' is missing.", f"messages[{at}].content")
    if message.refusal and message.content is None:
        made["content"] = message.refusal
    source = served.template.source if served.template else ""
    if message.role == "developer" and "developer" not in source:
        made["role"] = "system"
    if message.tool_calls:
        made["tool_calls"] = [
            _call(call, f"messages[{at}].tool_calls") for call in message.tool_calls
        ]
    return made


def _content(content: str | list[dict[str, Any]] | None, path: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part(part: dict[str, Any], path: str) -> str:
    kind = part.get("type")
    text = part.get(kind) if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise UnsupportedField(f"{path!r} is not a text part; this model reads text only.", path)
    return text


def _call(call: dict[str, Any], path: str) -> dict[str, Any]:
    """Clients send a call's arguments as a JSON string; templates want what it holds."""
    function = call.get("function")
    if not isinstance(function, dict):
        raise InvalidField(f"{path!r} has a call without a function.", path)
    try:
        arguments = json.loads(function.get("arguments", "{}"))
    except (TypeError, ValueError, RecursionError):
        arguments = function["arguments"]
    return call | {"function": function | {"arguments": arguments}}


def room(served: Served, prompt: Prompt, asked: int | None, default: int | None, width: int) -> int:
    """How many tokens each of `width` branches may have; unasked, as many as surely fit."""
    size = len(prompt.ids)
    fits = min(served.context - size, (served.capacity - size) // width)
    wanted = asked if asked is not None else max(1, min(default or fits, fits))
    if size + wanted > served.context:
        raise TooLong(
            f"This model's maximum context length is {served.context} tokens, but the prompt has"
            f" {size} and the answer may have {wanted}; shorten one of them.",
            "max_tokens" if asked and size < served.context else None,
        )
    if size + wanted > served.capacity:
        raise TooLong(
            f"This server's KV cache holds {served.capacity} tokens, but the prompt has {size} and"
            f" the answer may have {wanted}; shorten one of them.",
            "max_tokens",
        )
    return wanted
