"""The engine's process from outside: killed, stopped, broken, overtaken, and always replaced."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from model.sampling import Sampling
from server.engine import process
from server.engine.heart import Heart
from server.engine.process import Blueprint, Child, Client
from server.engine.request import Event, Request
from server.engine.wire import Cancel, Heard, Line, Submit, ToEngine, frame, to_front
from server.engine.worker import Worker
from server.errors import Duplicate, EngineDown, Failed, ModelError, NotFound
from tests.server.simulation import build

Result = TypeVar("Result")
BUILD = "tests.server.simulation.build"
GREEDY = Sampling(temperature=0.0)
LONG = 60_000  # tokens: more than anyone waits for


def blueprint(name: str = "build", **options: Any) -> Blueprint:
    return Blueprint(build=f"{BUILD}:{name}", options=options)


def ask_for(id: str, tokens: int = 5, prompt: int = 7, **fields: Any) -> Request:
    numbers = [1, 2, 3, prompt % 61]
    return Request(id=id, prompt=numbers, max_tokens=tokens, sampling=GREEDY, **fields)


async def stream(client: Client, request: Request) -> AsyncGenerator[Event, None]:
    """The events that a reader finds who looks whenever it is woken."""
    with client.open(request) as inbox:
        woken = asyncio.Event()
        inbox.wake = woken.set
        while True:
            event = inbox.take()
            if event is None:
                woken.clear()
                await woken.wait()
                continue
            yield event
            if event.done:
                return


async def listen(client: Client, request: Request) -> list[Event]:
    return [event async for event in stream(client, request)]


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for choice in event.choices for token in choice.tokens]


def alone(request: Request) -> list[int]:
    """The same in this process."""
    engine = build.build()
    engine.submit(request)
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    return tokens_of(events)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def child(client: Client) -> Child:
    assert client._child is not None
    return client._child


@asynccontextmanager
async def running(name: str = "build", **options: Any) -> AsyncIterator[Client]:
    client = Client(blueprint(name, **options))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


class House:
    """An engine that several tests share, and the loop that it lives on."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = Client(blueprint(pages=1 << 15, seats=64), unread=64)
        self.run(self.client.start())

    def run(self, task: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(asyncio.wait_for(task, 60))

    def close(self) -> None:
        self.run(self.client.stop())
        self.loop.close()


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def test_what_streams_is_what_the_engine_says(house: House) -> None:
    requests = [ask_for(f"same-{i}", 3 + i, prompt=i) for i in range(20)]

    async def all_at_once() -> list[list[Event]]:
        return await asyncio.gather(*(listen(house.client, request) for request in requests))

    for request, events in zip(requests, house.run(all_at_once()), strict=True):
        assert tokens_of(events) == alone(request)
        assert [event.done for event in events] == [False] * (len(events) - 1) + [True]
        assert events[0].prompt_tokens == 4
    assert house.client.info["pages"] == 1 << 15
    assert house.client.health().ready


def test_the_numbers_of_the_last_step_are_at_hand(house: House) -> None:
    before = house.client.stats()
    house.run(listen(house.client, ask_for("counted", 9)))
    after = house.client.stats()
    assert after.output_tokens - before.output_tokens == 9
    assert after.live + after.cached + after.free == after.pages == 1 << 15
    assert (after.running, after.waiting) == (0, 0)


def test_what_is_refused_is_told_by_one_event(house: House) -> None:
    (event,) = house.run(listen(house.client, ask_for("big", 1 << 20)))
    assert (event.done, event.code) == (True, "context_length_exceeded")
    assert "ask for less" in (event.error or "")


def test_leaving_early_ends_it_in_the_engine(house: House) -> None:
    async def leave() -> None:
        async with aclosing(stream(house.client, ask_for("left", LONG))) as events:
            async for _ in events:
                break
        before = house.client.stats().aborted.get("decode", 0)
        await until(lambda: house.client.stats().aborted.get("decode", 0) > before)

    house.run(leave())
    assert house.client.stats().running == 0
    assert house.client.unread == 0


def test_a_request_can_be_ended_by_its_id(house: House) -> None:
    async def cancel() -> list[Event]:
        task = asyncio.ensure_future(listen(house.client, ask_for("ended", LONG)))
        await until(lambda: house.client.stats().running)
        house.client.cancel("ended")
        return await task

    last = house.run(cancel())[-1]
    assert last.choices[-1].finish == "cancelled"
    assert last.error is None


def test_an_id_is_used_once_at_a_time(house: House) -> None:
    async def twice() -> list[Event]:
        task = asyncio.ensure_future(listen(house.client, ask_for("twin", 2000)))
        await until(lambda: house.client.stats().running)
        with pytest.raises(Duplicate, match="'twin' is here already"):
            await listen(house.client, ask_for("twin"))
        return await task

    assert len(tokens_of(house.run(twice()))) == 2000


def test_who_does_not_read_is_cut_off_and_nobody_else(house: House) -> None:
    async def read_late() -> tuple[list[Event], list[Event]]:
        late = []
        async with aclosing(stream(house.client, ask_for("late", LONG))) as events:
            async for event in events:
                late.append(event)
                if len(late) == 1:
                    other = await listen(house.client, ask_for("quick", 500))
                    await until(lambda: "slow_client" in _codes(house.client))
        return late, other

    late, other = house.run(read_late())
    assert (late[-1].code, late[-1].done) == ("slow_client", True)
    assert tokens_of(late) == alone(ask_for("late", len(tokens_of(late))))
    assert tokens_of(other) == alone(ask_for("quick", 500))


def _codes(client: Client) -> list[str | None]:
    inboxes = client._registry._inboxes.values()
    return [inbox.event.code for inbox in inboxes if inbox.event is not None]


def test_who_leaves_before_the_next_step_costs_none() -> None:
    """T30: a cancellation that is read together with its request comes before any of its rows."""
    theirs, ours = socket.socketpair()
    heart = Heart()
    engine = build.build()
    both: list[ToEngine] = [Submit(ask_for("hasty", LONG)), Cancel("hasty")]
    with theirs, ours:
        theirs.sendall(b"".join(frame(one) for one in both))
        theirs.shutdown(socket.SHUT_WR)
        Worker(engine, Line(ours), heart).run()
        (step,) = to_front().feed(theirs.recv(1 << 16))
    heart.close()
    assert isinstance(step, Heard)
    assert [(event.id, event.done) for event in step.events] == [("hasty", True)]
    assert (step.stats.steps, step.stats.aborted) == (0, {"queue": 1})
    assert engine.idle


def test_questions_are_answered_between_steps(house: House) -> None:
    assert house.run(house.client.ask("double", number=21)) == 42
    with pytest.raises(NotFound, match="Nobody answers 'nothing'"):
        house.run(house.client.ask("nothing"))
    with pytest.raises(Failed, match="fail failed"):
        house.run(house.client.ask("fail"))
    with pytest.raises(Failed, match="strange failed"):
        house.run(house.client.ask("strange"))
    assert not house.client._asked


def test_a_request_that_cannot_begin_fails_alone(house: House) -> None:
    (event,) = house.run(listen(house.client, ask_for("odd", stop=("\0odd",))))
    assert event.code == "failed"
    assert house.client.health().restarts == 0


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_engine_is_told_of_and_replaced(times: int) -> None:
    async def story() -> None:
        async with running(pages=1 << 15) as client:
            client._deaths = deque(maxlen=1)  # deaths are never too many
            expected = alone(ask_for("", 20))
            for round in range(times):
                await _kill_one(client, round)
                events = await listen(client, ask_for(f"again-{round}", 20))
                assert tokens_of(events) == expected
                assert client.health().restarts == round + 1

    asyncio.run(story())


async def _kill_one(client: Client, round: int) -> None:
    streams = [
        asyncio.ensure_future(listen(client, ask_for(f"{round}-{i}", LONG))) for i in range(32)
    ]
    await until(lambda: client.stats().running == 32)
    os.kill(child(client).pid, signal.SIGKILL)
    for events in await asyncio.wait_for(asyncio.gather(*streams), 30):
        assert [event.code for event in events if event.done] == ["engine_down"]
        assert events[-1].done
    assert not client.health().ready
    with pytest.raises(EngineDown):
        await client.ask("double", number=1)
    (refused,) = await listen(client, ask_for(f"early-{round}"))
    assert refused.code == "engine_down"
    await until(lambda: client.health().ready)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same supervision, in a hurry."""
    monkeypatch.setattr(Heart, "stale", property(lambda heart: heart.age > 1.5))
    monkeypatch.setattr(process, "WATCH", 0.05)
    monkeypatch.setattr(process, "BACK_OFF", 0.001)


def test_a_hung_engine_is_not_ready_and_goes_on_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick(monkeypatch)

    async def story() -> None:
        async with running() as client:
            stream = asyncio.ensure_future(listen(client, ask_for("patient", 3000)))
            await until(lambda: client.stats().running)
            os.kill(child(client).pid, signal.SIGSTOP)
            await until(lambda: client.health().state == "hung")
            assert "no sign of life" in client.health().reason
            (refused,) = await listen(client, ask_for("impatient"))
            assert refused.code == "engine_down"
            os.kill(child(client).pid, signal.SIGCONT)
            assert tokens_of(await stream) == alone(ask_for("patient", 3000))
            await until(lambda: client.health().ready)
            assert client.health().restarts == 0

    asyncio.run(story())


def test_one_that_hangs_too_long_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(process, "HANGING", 0.2)

    async def story() -> None:
        async with running() as client:
            stream = asyncio.ensure_future(listen(client, ask_for("lost", LONG)))
            await until(lambda: client.stats().running)
            os.kill(child(client).pid, signal.SIGSTOP)
            assert (await stream)[-1].code == "engine_down"
            await until(lambda: client.health().restarts == 1 and client.health().ready)

    asyncio.run(story())


def test_an_engine_that_dies_at_every_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)

    async def story() -> None:
        client = Client(blueprint("crash"))
        with pytest.raises(EngineDown, match=r"died 5 times in 300 s"):
            await client.start()
        assert "died 5 times" in await client.gave_up()
        assert client.health().state == "failed"
        assert client.health().restarts == 4
        await client.stop()

    asyncio.run(story())


def test_a_model_that_cannot_be_loaded_is_tried_once() -> None:
    async def story() -> None:
        client = Client(blueprint("broken"))
        with pytest.raises(ModelError, match=r"weights\.safetensors ends too early"):
            await client.start()
        assert client.health().restarts == 0
        await client.stop()
        await client.stop()

    asyncio.run(story())


def test_stopping_while_it_loads_ends_it() -> None:
    async def story() -> None:
        client = Client(blueprint())
        start = asyncio.ensure_future(client.start())
        await until(lambda: client._child is not None)
        loading = child(client)
        assert client.health().state == "loading"
        await client.stop()
        assert loading._process.poll() is not None
        assert client.health().state == "stopped"
        with pytest.raises(EngineDown, match="stopping"):
            await start

    asyncio.run(story())


FRONT = """
import asyncio
from tests.server.test_process import *
async def main():
    async with running() as client:
        print(child(client).pid, flush=True)
        await listen(client, ask_for("orphan", LONG))
asyncio.run(main())
"""


def test_the_engine_does_not_outlive_the_front() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", FRONT], cwd=root, stdout=subprocess.PIPE, text=True
    ) as front:
        assert front.stdout is not None
        engine = int(front.stdout.readline())
        front.kill()
    asyncio.run(until(lambda: not Path(f"/proc/{engine}").exists() or _is_zombie(engine)))


def _is_zombie(pid: int) -> bool:
    """Dead, and not yet buried by whoever inherited it."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
