"""One client's streamed completion, what it got, and a goal's row of the table."""

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.served import HEAD, status

Row = dict[str, Any]


@dataclass
class Said:
    """What one request got."""

    status: int = 0
    text: str = ""
    tokens: int = 0  # as far as ids were asked for
    done: bool = False  # [DONE] came, or the plain answer was whole
    error: str = ""
    seconds: float = 0.0
    first: float = 0.0


async def ask(port: int, leave: float | None = None, **body: Any) -> Said:
    """One streamed completion; `leave`: hang up after so many seconds."""
    said, began = Said(), time.monotonic()
    raw = json.dumps(
        {"prompt": "Once upon a time", "stream": True, "temperature": 0} | body
    ).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        said.error = type(error).__name__
        return said
    writer.write(f"{HEAD}content-length: {len(raw)}\r\nconnection: close\r\n\r\n".encode() + raw)
    data = b""
    try:
        async with asyncio.timeout(leave):
            while part := await reader.read(1 << 16):
                said.first = said.first or time.monotonic() - began
                data += part
    except (TimeoutError, OSError) as error:
        said.error = type(error).__name__
    finally:
        writer.transport.abort()
    said.seconds = time.monotonic() - began
    _read(said, data)
    return said


def _read(said: Said, data: bytes) -> None:
    said.status = status(data)
    said.done = b"data: [DONE]" in data
    if said.status > 200:
        said.error = json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"]
    for line in data.decode("utf-8", "replace").splitlines():
        if line.startswith("data: {"):
            body = json.loads(line[6:])
            if "error" in body:
                said.error = body["error"]["code"]
            for choice in body.get("choices", ()):
                said.text += choice["text"]
                said.tokens += len(choice.get("token_ids") or ())


async def until(look: Callable[[], Awaitable[float]], value: float) -> float:
    """When it is so."""
    async with asyncio.timeout(60):
        while await look() != value:
            await asyncio.sleep(0.01)
    return time.monotonic()


def row(goal: str, about: str, good: bool, found: dict[str, Any], health: list[float]) -> Row:
    """`health`: how long each answer about health took meanwhile."""
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    worst = (percentile(health, 0.99), max(health)) if health else (None, None)
    slowest = [seconds and round(1000 * seconds, 1) for seconds in worst]
    seen = dict(zip(("health_p99_ms", "health_max_ms"), slowest, strict=True))
    return {"goal": goal, "about": about, "met": str(good), "found": told, **seen}


def percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[int(len(seconds) * share)]


def spread(found: list[float]) -> str:
    """The median, and the least and the most."""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def waits(**seconds: list[float]) -> Row:
    """Median and 99th percentile of each, in milliseconds."""
    told = {}
    for name, some in seconds.items():
        half, most = (round(percentile(some, share) * 1000) for share in (0.5, 0.99))
        told[f"{name}_ms"] = f"{half} (p99 {most})"
    return told
