"""Clients of a server of our own on loopback, each with a clock: streams, alone or in a crowd."""

import asyncio
import json
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.served import HEAD
from model.checkpoint import locate

Prompt = list[int]


@dataclass
class Answer:
    """When its tokens came, in seconds after the question; several can come in one event."""

    tokens: int = 0
    at: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.at[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events."""
        return [after - before for before, after in zip(self.at, self.at[1:])]


async def ask(port: int, prompt: Prompt, new: int) -> Answer:
    """One streamed completion of exactly `new` tokens, or an error."""
    fields = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = json.dumps({"prompt": prompt, "stream": True} | fields).encode()
    answer, began, rest = Answer(), time.perf_counter(), b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{HEAD}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
    while data := await reader.read(1 << 16):
        came = time.perf_counter() - began
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            count = _tokens(event)
            answer.tokens += count
            answer.at += [came] * (count > 0)
    writer.close()
    if answer.tokens != new:
        raise RuntimeError(f"{answer.tokens} tokens came instead of {new}: {rest[-300:]!r}")
    return answer


def _tokens(event: bytes) -> int:
    """How many an event brings; the head of the reply can stand before the first."""
    _, found, line = event.rpartition(b"data: {")
    if not found:
        return 0
    choices = json.loads(b"{" + line).get("choices", ())
    return sum(len(choice.get("token_ids") or ()) for choice in choices)


async def closed(port: int, prompts: Iterable[Prompt], new: int, clients: int) -> list[Answer]:
    """Each client asks again as soon as it is answered, while there are prompts."""
    waiting = iter(prompts)

    async def client() -> list[Answer]:
        return [await ask(port, prompt, new) for prompt in waiting]

    found = await asyncio.gather(*[client() for _ in range(clients)])
    return [answer for answers in found for answer in answers]


async def opened(
    port: int, prompts: Iterable[Prompt], new: int, due: Sequence[float]
) -> list[Answer]:
    """Each asks at its own time, in seconds from now, whether others are answered or not."""

    async def client(prompt: Prompt, seconds: float) -> Answer:
        await asyncio.sleep(seconds)
        return await ask(port, prompt, new)

    return await asyncio.gather(*[client(prompt, when) for prompt, when in zip(prompts, due)])


def flags(options: Namespace, shared: bool = False) -> list[str]:
    """The server's, for the same engine as the offline one."""
    cache = "--prefix-cache" if shared else "--no-prefix-cache"
    return [cache, "--threads", str(options.threads), "--quantize", options.quantize]


def vocabulary(model: str | None) -> int:
    """Of a model that is not loaded here."""
    about = json.loads((locate(model) / "config.json").read_text())
    return int(about["vocab_size"])
