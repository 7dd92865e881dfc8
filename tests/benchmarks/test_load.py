"""Latency and throughput: what comes over HTTP is counted, and loads are what they say."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from benchmarks import clients
from benchmarks.throughput import BURST, PROMPT, arrivals, prompts


@pytest.mark.parametrize("burst", [1, BURST])
def test_requests_come_as_often_as_asked(burst: int) -> None:
    due = arrivals(4.0, 8000, burst)
    assert due == sorted(due)
    assert len(due) / due[-1] == pytest.approx(4.0, rel=0.1)
    assert len(set(due)) == 8000 / burst


def test_prompts_share_their_first_half_only_if_asked() -> None:
    own, shared = (np.array(prompts(500, 6, wish, 1)) for wish in (False, True))
    half = PROMPT // 2
    assert len({tuple(row) for row in shared[:, :half].tolist()}) == 1
    assert len({tuple(row) for row in own[:, :half].tolist()}) == 6
    assert len({tuple(row) for row in shared.tolist()}) == 6


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_tokens_are_counted_wherever_packets_end(cut: int) -> None:
    """The first event stands behind the head; one event can bring several tokens."""
    events = [{"choices": [{"token_ids": ids}]} for ids in ([7], [8, 9])] + [{"choices": []}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    raw = ("HTTP/1.1 200 OK\r\n\r\n" + body).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for part in (raw[:cut], raw[cut:]):
            writer.write(part)
            await writer.drain()
        writer.close()

    async def whole() -> clients.Answer:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await clients.ask(server.sockets[0].getsockname()[1], [1], 3)

    said = asyncio.run(whole())
    assert said.tokens == 3
    assert len(said.at) == 2
    assert said.at == sorted(said.at)
    with pytest.raises(RuntimeError, match="0 tokens came instead of 3"):
        asyncio.run(_short())


async def _short() -> clients.Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b'HTTP/1.1 429 No\r\n\r\n{"error": {}}')
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        return await clients.ask(server.sockets[0].getsockname()[1], [1], 3)


def run(module: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--threads", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_throughput_of_the_embedded_model() -> None:
    rows = run("throughput", "--clients", "2", "--rates", "4")["rows"]
    assert len(rows) == 2 * 2 * 3  # ways, prefixes, loads
    assert {row["over"] for row in rows} == {"offline", "http"}
    assert all(row["tok/s"] > 0 and row["first p50 ms"] > 0 for row in rows)


@pytest.mark.slow
def test_latency_of_the_embedded_model() -> None:
    rows = run("latency", "--prompts", "16", "--batches", "1", "2")["rows"]
    assert [(row["over"], row["batch"]) for row in rows] == [
        (way, batch) for way in ("offline", "http") for batch in (1, 2)
    ]
    assert all(row["p5"] <= row["next ms"] <= row["p95"] for row in rows)
