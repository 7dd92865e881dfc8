"""G4, G5: the engine is killed, the server is told to stop."""

import argparse
import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.served import Served, served
from benchmarks.soak.ask import Row, ask, row, until
from benchmarks.soak.health import health


async def deaths(asked: argparse.Namespace) -> Row:
    """G4: the engine is killed in mid-stream; each client hears of it, and all comes back."""
    seen: list[float] = []
    all_told: list[Died] = []
    while len(all_told) < asked.times:  # a fifth death in five minutes is the end, as it should
        async with served(asked) as one, health(one) as some:
            before = (await ask(one.port, max_tokens=24)).text
            left = range(min(4, asked.times - len(all_told)))
            all_told += [await _death(one, before) for _ in left]
        seen += some
    told, back = (max(getattr(one, name) for one in all_told) for name in ("told", "back"))
    found = {
        "times": asked.times,
        "clients_told": sum(one.cut for one in all_told),
        "told_s": round(told, 2),
        "down_s": round(max(one.down for one in all_told), 2),
        "back_s": round(back, 2),
        "same": sum(one.same for one in all_told),
    }
    down = max(one.down for one in all_told)
    good = told < 2 and down < 2 and back < 15 and found["same"] == asked.times
    return row("G4", "engine killed", good and all(one.cut for one in all_told), found, seen)


@dataclass
class Died:
    """What one death was to those who had something under way."""

    told: float  # seconds until the last of them had its error event
    down: float  # until the server said that it is not ready
    back: float  # until it was ready again
    cut: int  # clients whose stream was under way
    same: bool  # the same prompt gives the same text


async def _death(one: Served, before: str) -> Died:
    many = range(32)
    running = [asyncio.create_task(ask(one.port, max_tokens=900, ignore_eos=True)) for _ in many]
    await until(lambda: one.metric("vllm:num_requests_running"), 32)
    began = time.monotonic()
    os.kill(one.engine(), signal.SIGKILL)
    down = asyncio.create_task(until(lambda: one.status("/health/ready"), 503))
    said = await asyncio.gather(*running)
    told = time.monotonic() - began
    wrong = [one for one in said if one.done or one.status != 200 or one.error != "engine_down"]
    assert not wrong, wrong
    down_s = await down - began
    await one.ready()
    back = time.monotonic() - began
    again = await ask(one.port, max_tokens=24)
    return Died(told, down_s, back, len(said), again.text == before)


async def drains(asked: argparse.Namespace) -> Row:
    """G5: SIGTERM with streams under way and waiting; none is cut, the status is 0, all is left."""
    cut, statuses, left, refused = 0, [], 0, []
    for _ in range(asked.times):
        async with served(asked, "--rows", "16") as one:
            fields = {"max_tokens": 128, "ignore_eos": True}
            running = [asyncio.create_task(ask(one.port, **fields)) for _ in range(32)]
            await until(lambda: one.metric("vllm:num_requests_waiting"), 16)
            children = one.children()
            began = time.monotonic()
            one.process.terminate()
            refused.append(await until(lambda: one.status("/v1/models"), 0) - began)
            cut += sum(not said.done for said in await asyncio.gather(*running))
            statuses.append(await one.process.wait())
            left += sum(Path(f"/proc/{pid}/stat").exists() for pid in children)
    found = {"times": asked.times, "cut": cut, "statuses": sorted(set(statuses)), "left": left}
    found["refused_s"] = round(max(refused), 2)
    good = not cut and set(statuses) == {0} and not left and max(refused) < 1
    return row("G5", "SIGTERM drains", good, found, [])
