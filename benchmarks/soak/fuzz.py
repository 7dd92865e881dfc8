"""G6: seeded mutations of valid requests, and everything that was made bad by hand."""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from http.client import HTTPConnection

from tqdm import tqdm

from benchmarks.served import served, status
from benchmarks.soak.ask import Row, row
from benchmarks.soak.health import PATIENCE, health
from benchmarks.soak.malformed import messages
from benchmarks.soak.mutations import mutation

CLIENTS, GROWTH = 8, 200  # at once; MiB
FIELDS = {"message", "type", "param", "code"}


async def fuzz(asked: argparse.Namespace) -> Row:
    """G6: mutations of valid requests and hand-made bad ones; each error is an error object."""
    flags = ("--served-name", "tiny", "--context", "256")  # nobody waits for a long answer here
    async with served(asked, *flags) as one, health(one) as seen:
        await asyncio.to_thread(send_all, one.port, range(64))
        before = sum(one.memory())
        shares = [range(first, asked.mutations, CLIENTS) for first in range(CLIENTS)]
        seeds: list[Iterable[int]] = [tqdm(shares[0], f"×{CLIENTS}", disable=None), *shares[1:]]
        found = await asyncio.gather(*[asyncio.to_thread(send_all, one.port, s) for s in seeds])
        statuses = sum((counted for counted, _ in found), Counter[int]())
        faults = [fault for _, some in found for fault in some]
        for message in messages():
            faults += by_hand(await asyncio.wait_for(one.raw(message), PATIENCE))
        growth = (sum(one.memory()) - before) / 2**20
        alive = await one.status("/health/ready") == 200
        told = {"mutations": statuses.total(), "by_hand": len(messages()), "faults": len(faults)}
        told |= {str(code): count for code, count in sorted(statuses.items())}
        told["mib_more"] = round(growth)
    for fault in faults[:5]:
        print(fault)
    return row("G6", "fuzz", alive and not faults and growth < GROWTH, told, seen)


def send_all(port: int, seeds: Iterable[int]) -> tuple[Counter[int], list[str]]:
    """The statuses of these mutations, and what is wrong with the answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    statuses, faults = Counter[int](), []
    for seed in seeds:
        path, raw = mutation(seed)
        try:
            connection.request("POST", path, raw, {"content-type": "application/json"})
            got = connection.getresponse()
            wrong = fault(got.status, got.getheader("content-type") or "", got.read())
            statuses[got.status] += 1
        except OSError as error:  # a time-out among them
            wrong = type(error).__name__
            connection.close()
        if wrong:
            faults.append(f"seed {seed}: {wrong}, of {raw[:200]!r} to {path}")
    connection.close()
    return statuses, faults


def fault(status: int, kind: str, data: bytes) -> str:
    """What an answer should not be; nothing when it is as it should be."""
    if status >= 500:
        return f"{status} {data[:200]!r}"
    if status != 200:
        return "" if _is_error(data) else f"no error object: {data[:200]!r}"
    if kind.startswith("text/event-stream"):
        return (
            "" if data.endswith(b"data: [DONE]\n\n") else f"an end without [DONE]: {data[-99:]!r}"
        )
    return "an error with status 200" if "error" in json.loads(data) else ""


def _is_error(data: bytes) -> bool:
    """OpenAI's object, with a sentence, and not long."""
    try:
        error = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == FIELDS and bool(error["message"]) and len(data) < 8192


def by_hand(data: bytes) -> list[str]:
    """Refused with one error object, or hung up on while the client was still sending."""
    head, _, body = data.partition(b"\r\n\r\n")
    code = status(data)
    if not data or (400 <= code < 500 and _is_error(body)):
        return []
    return [f"by hand: {code} {head[:100]!r} {body[:200]!r}"]
