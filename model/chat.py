"""Chat templates: a conversation → the text, and the ids, that a model was taught to go on from."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from model.sandbox import Reply, Sandbox
from model.tokenfiles import TokenizerError, load_json, load_text
from model.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

SOURCE = 1 << 20  # characters of a template; the longest in use have 20,000
# What a request cannot set: the conversation, and what templates find in their environment.
OURS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
OURS |= {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "loop", "caller", "self"}
OURS |= {"raise_exception", "strftime_now", "chat_template", "tokenize"}
REASONING = ("reasoning_content", "thinking", "reasoning")
TAG = "KVIST_GOES_ON_HERE "  # stands where the model goes on; its space tells if templates trim
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around special tokens that a user wrote; no text may have them
WRITTEN = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")


class TemplateError(Exception):
    """A template that cannot be used at all."""


class ChatError(ValueError):
    """A conversation that the template does not take; whoever sent it can mend it."""

    def __init__(self, message: str, template_message: str | None = None) -> None:
        super().__init__(message)
        self.template_message = template_message  # the template's own words, if it spoke


class ChatTemplate:
    """A model's template; it renders in a process of its own, and any thread may ask it to."""

    def __init__(
        self,
        source: str | Mapping[str, str],
        tokens: Mapping[str, str],
        *,
        seconds: float = 1.0,
        size: int = 1 << 20,
    ) -> None:
        """`tokens`: "eos_token" → "</s>" and so on. `seconds` of CPU and `size` in characters are
        the most that a rendering may take."""
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise TemplateError(f"no template is the default, of {', '.join(sorted(sources))}")
        self.source = sources["default"]
        if len("".join(sources.values())) > SOURCE:
            raise TemplateError(f"the chat template is longer than {SOURCE} characters")
        self._names, self._tokens, self._size = set(sources), dict(tokens), size
        self._sandbox = Sandbox(sources, seconds, size)
        if reply := self._sandbox.start():
            raise TemplateError(f"the chat template does not compile: {reply['wrong']}")

    @staticmethod
    def load(folder: Path | str, tokens: Mapping[str, str], **caps: Any) -> "ChatTemplate | None":
        """The template in a model's folder; nothing where the model has none."""
        source = find(Path(folder))
        return ChatTemplate(source, tokens, **caps) if source else None

    def render(
        self,
        messages: Messages,
        /,
        add_generation_prompt: bool = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
        **more: Any,
    ) -> str:
        """The text. `continue_final_message`: it ends where the last message does."""
        if taken := sorted(name for name in more if name in OURS | self._tokens.keys()):
            raise ChatError(f"a template's {taken[0]!r} cannot be set")
        if continue_final_message and add_generation_prompt:
            raise ChatError("continue_final_message needs add_generation_prompt to be false")
        chat = [_as_templates_want(message) for message in messages]
        if not chat:
            raise ChatError("a conversation needs at least one message")
        last = _tag(chat[-1]) if continue_final_message else ""
        names = {**self._tokens, **more, "messages": chat, "tools": tools, "documents": documents}
        names["add_generation_prompt"] = add_generation_prompt
        use = "tool_use" if tools and "tool_use" in self._names else "default"
        text = self._text(self._sandbox.render(use, names))
        return _cut_at_tag(text, last) if continue_final_message else text

    def render_ids(
        self, tokenizer: Tokenizer, messages: Messages, /, *args: Any, **more: Any
    ) -> tuple[str, list[int]]:
        """The text and its ids, in which only the template's own special tokens are special: those
        that someone wrote into a message, a tool or an argument are plain text."""
        special = frozenset(tokenizer.special.values())
        try:
            messages, args, more = _mark(tokenizer, special, [messages, args, more])
        except RecursionError:
            raise ChatError("messages are nested too deeply") from None
        text = self.render(messages, *args, **more)
        start, *rest = WRITTEN.split(text)
        ids = tokenizer.encode(start, special=True, bos=False)
        for i, part in enumerate(rest):
            if part:
                ids += tokenizer.encode_rest(part, special=i % 2 == 1)
        return start + "".join(part or "" for part in rest), ids

    def _text(self, reply: Reply) -> str:
        if "text" in reply:
            return str(reply["text"])
        if "refusal" in reply:
            raise ChatError(f"the chat template refuses: {reply['refusal']}", reply["refusal"])
        if "long" in reply:
            raise ChatError(f"the rendered chat is longer than {self._size} characters")
        raise ChatError(f"the chat template cannot render these messages: {reply['wrong']}")


# ── where templates are ───────────────────────────────────────────────────────────────────────


def find(folder: Path) -> str | dict[str, str] | None:
    """Files of their own count before tokenizer_config.json, as they do for transformers."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    found = {name: load_text(path) for name, path in files.items() if path.exists()}
    if found:
        return found
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        content = load_json(path) if path.exists() else None
        if isinstance(content, dict) and content.get("chat_template"):
            return _named(content["chat_template"], name)
    return None


def _named(found: Any, where: str) -> str | dict[str, str]:
    """A template, or a list of templates with names."""
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    texts = found.items() if isinstance(found, dict) else [("default", found)]
    if not all(isinstance(word, str) for pair in texts for word in pair):
        raise TokenizerError(f"{where}: chat_template is neither text nor a list of named texts")
    return dict(texts)


# ── messages ──────────────────────────────────────────────────────────────────────────────────


def _as_templates_want(message: dict[str, Any]) -> dict[str, Any]:
    """Without empty fields, which templates take for text; reasoning under each of its names."""
    if not isinstance(message, dict):
        raise ChatError(f"a message must be an object, and one is a {type(message).__name__}")
    made = {name: value for name, value in message.items() if value is not None}
    reasoning = next((made[name] for name in REASONING if name in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    return made


def _tag(message: dict[str, Any]) -> str:
    """Mark the end of the last message; what it was."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [i for i, part in enumerate(content) if isinstance(part, dict) and "text" in part]
        if texts:
            parts = message["content"] = [*content]
            text = str(content[texts[-1]]["text"])
            parts[texts[-1]] = {**content[texts[-1]], "text": text + TAG}
            return text
    if not isinstance(content, str):
        raise ChatError("the last message has no text that could go on")
    message["content"] = content + TAG
    return content


def _cut_at_tag(text: str, last: str) -> str:
    place = text.rfind(TAG.strip())
    if place < 0 or last.strip() not in text:
        raise ChatError("the last message is not in the rendered chat, so it cannot go on")
    return text[:place] if text.startswith(TAG, place) else text[:place].rstrip()


def _mark(tokenizer: Tokenizer, special: frozenset[int], value: Any) -> Any:
    """Every string in it, with marks around the special tokens that are written there."""
    if isinstance(value, str):
        parts = tokenizer.cut(value.replace(OPEN, "").replace(CLOSE, ""))
        return "".join(OPEN + part + CLOSE if id in special else part for part, id in parts)
    mark = partial(_mark, tokenizer, special)
    if isinstance(value, dict):
        return {mark(name): mark(one) for name, one in value.items()}
    return list(map(mark, value)) if isinstance(value, (list, tuple)) else value
