"""Stand-ins for the engine and the words, so that the front can be tested alone.

The fake engine speaks the client's interface and invents text: token i of a branch is a function
of the prompt, the seed, the branch and i alone. Faults are asked for by name.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from server.engine.process import Health
from server.engine.registry import Inbox
from server.engine.request import Choice, Event, Request, Stats

TEXT = "The quick brown fox jumps over the lazy dog. Ett träd växer långsamt; 木は育つ 🌱! "
EOS, BOS, IM = 256, 257, 258
QUEUED = 0.5  # seconds that each request says it waited


class FakeWords:
    """Bytes are tokens; three more are special."""

    eos = EOS
    bos = BOS
    vocabulary = 259

    def __init__(self) -> None:
        self.special = {"<eos>": EOS, "<bos>": BOS, "<|im|>": IM}
        self._names = {id: name for name, id in self.special.items()}

    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]:
        ids = [BOS] if bos else []
        if special:
            for name, id in self.special.items():
                text = text.replace(name, chr(0xE000 + id))
        for letter in text:
            code = ord(letter) - 0xE000
            ids += [code] if special and code in self._names else letter.encode()
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        shown = [id for id in ids if id < 256 or not skip_special]
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def encode_rest(self, text: str, *, special: bool = False) -> list[int]:
        return self.encode(text, special=special, bos=False)

    def cut(self, text: str) -> list[tuple[str, int | None]]:
        parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
        return [(part, self.special.get(part)) for part in parts]

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else self._names[id].encode()


class FakeTemplate:
    source = "{% for m in messages %}<|im|>{{ m.role }}: {{ m.content }}\n{% endfor %}"

    def render_ids(
        self, tokenizer: Any, messages: list[dict[str, Any]], /, *args: Any, **more: Any
    ) -> tuple[str, list[int]]:
        lines = [f"<|im|>{one['role']}: {one['content']}\n" for one in messages]
        text = "".join(lines) + ("<|im|>assistant: " if more["add_generation_prompt"] else "")
        text = text.rstrip("\n") if more["continue_final_message"] else text
        return text, tokenizer.encode(text, special=True, bos=False)


def logprob(id: int) -> float:
    return -((id * 37) % 100) / 16  # exact in float32


class FakeEngine:
    """What server.engine.process.Client does, with invented text and scripted faults."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Event] = {}
        self.seen: list[Request] = []  # the newest last
        self.cancelled: list[str] = []
        self.state: Any = "ready"
        self.age = 0.0
        self.delay = 0.0  # seconds between events
        self.hold: asyncio.Event | None = None  # wait for it before the first event
        self.fail_at: int | None = None  # the event of which number is an error …
        self.code = "engine_down"  # … with this code
        self.burst = 1  # tokens an event
        self.raises: Exception | None = None
        self.info: dict[str, Any] = {"kernels": {"sample": "torch: result 0 is off by 3"}}

    @property
    def unread(self) -> int:
        return 0

    def health(self) -> Health:
        reason = "" if self.state == "ready" else "It died."
        return Health(state=self.state, age=self.age, restarts=0, reason=reason)

    def stats(self) -> Stats:
        sizes = [1, 2, 3]
        stats = Stats(steps=6, step_tokens=21, step_sizes=sizes, pages=64, page_size=16, free=64)
        stats.running = len(self.running)
        return stats

    def cancel(self, id: str) -> None:
        if id in self.running:
            self.running[id].set()

    async def ask(self, what: str, **arguments: Any) -> Any:
        assert what == "embed"
        digest = hashlib.sha256(repr(arguments).encode()).digest()
        return [byte / 256 for byte in digest[:8]]

    @contextmanager
    def open(self, request: Request) -> Iterator[Inbox]:
        self.seen.append(request)
        if self.raises is not None:
            raise self.raises
        stop = self.running[request.id] = asyncio.Event()
        inbox = Inbox(request.id)
        speaking = asyncio.create_task(self._speak(request, stop, inbox))
        try:
            yield inbox
        finally:
            speaking.cancel()
            inbox.wake = None
            del self.running[request.id]
            if not inbox.done:
                self.cancelled.append(request.id)

    async def _speak(self, request: Request, stop: asyncio.Event, inbox: Inbox) -> None:
        async for event in self._events(request, stop):
            inbox.put(event)

    async def _events(self, request: Request, stop: asyncio.Event) -> AsyncGenerator[Event, None]:
        if self.hold is not None:
            await self.hold.wait()
        branches = [Voice(request, index) for index in range(request.n)]
        first = True
        for number in range(10**9):
            if number == self.fail_at:
                yield Event(id=request.id, done=True, error="The engine died.", code=self.code)
                return
            choices = [one.choice(self.burst) for one in branches if not one.finished]
            done = all(one.finished for one in branches)
            event = Event(id=request.id, choices=choices, done=done)
            if first:
                first = False
                event.prompt_tokens = len(request.prompt)
                event.queued = QUEUED
                event.prompt_logprobs = prompt_logprobs(request)
            yield event
            if done:
                return
            if stop.is_set():
                yield Event(id=request.id, done=True, error="Cancelled.", code="cancelled")
                return
            await asyncio.sleep(self.delay)


class Voice:
    """One branch: bytes of TEXT from a place that depends on prompt, seed and branch."""

    def __init__(self, request: Request, index: int) -> None:
        greedy = request.sampling.temperature == 0
        key = (request.prompt, None if greedy else request.sampling.seed, 0 if greedy else index)
        self.request = request
        self.index = index
        data = TEXT.encode()
        place = hashlib.sha256(repr(key).encode()).digest()[0] % len(TEXT)
        begin = len(TEXT[:place].encode())
        self._data = data[begin:] + data[:begin]
        self._at = 0
        self._held = b""
        self._text = ""
        self._said = 0
        self.finished = False
        if request.beams:
            self.score: float | None = -float(index)
        else:
            self.score = None

    def choice(self, count: int) -> Choice:
        request = self.request
        made = Choice(index=self.index)
        for _ in range(count):
            if len(made.tokens) + self._at >= request.max_tokens:
                break
            made.tokens.append(self._data[(self._at + len(made.tokens)) % len(self._data)])
        self._at += len(made.tokens)
        self._held += bytes(made.tokens)
        text, self._held = _whole(self._held)
        self._text += text
        for stop in request.stop:
            if stop in self._text:
                end = self._text.index(stop) + (len(stop) if request.include_stop else 0)
                made.text, made.finish, made.stop = self._text[self._said : end], "stop", stop
                break
        else:
            last = self._at >= request.max_tokens
            if last:
                self._text += self._held.decode("utf-8", "replace")
            certain = len(self._text) - (0 if last else _may_stop(self._text, request.stop))
            made.text = self._text[self._said : certain]
            made.finish = "length" if last else None
            self._said = max(self._said, certain)
        self.finished = made.finish is not None
        if self.finished and self.score is not None:
            made.score, made.cumulative_logprob = self.score, self.score * 2
        if request.logprobs is not None:
            made.logprobs = [logprob(id) for id in made.tokens]
            made.ranks = [1 for _ in made.tokens]
            made.top = [rivals(id, request.logprobs) for id in made.tokens]
        return made


def _whole(data: bytes) -> tuple[str, bytes]:
    """The characters that are complete, and the bytes that are not."""
    for held in range(4):
        try:
            return data[: len(data) - held].decode(), data[len(data) - held :]
        except UnicodeDecodeError:
            continue
    return data.decode("utf-8", "replace"), b""


def _may_stop(text: str, stops: tuple[str, ...]) -> int:
    """How many last characters may be the beginning of a stop string."""
    ends = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(ends, default=0)


def rivals(id: int, count: int) -> list[tuple[int, float]]:
    """The chosen one is the best."""
    return [((id + k) % 256, logprob(id) - k) for k in range(count)]


def prompt_logprobs(request: Request) -> list[Any]:
    if request.prompt_logprobs is None:
        return []
    told = [(logprob(id), 1, rivals(id, request.prompt_logprobs)) for id in request.prompt[1:]]
    return [None, *told]
