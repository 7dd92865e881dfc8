"""What lies between the front and the engine: frames, joined events, unread output, the heart."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import ValidationError
from msgspec.structs import asdict

from server.engine.fold import join
from server.engine.heart import FLOOR, UNSEEN, Heart, Pace
from server.engine.process import Ear
from server.engine.registry import Registry
from server.engine.request import Beams, Choice, Event, Request, Stats
from server.engine.wire import (
    Ask,
    Cancel,
    Heard,
    Step,
    Submit,
    ToEngine,
    ToFront,
    frame,
    to_engine,
    to_front,
)
from server.errors import Duplicate, EngineDown

MESSAGES: list[ToEngine] = [
    Submit(Request(id="a", prompt=[1, 2**31 - 1], max_tokens=3, stop=("é",))),
    Submit(Request(id="b", prompt=[1], max_tokens=1, beams=Beams(width=3, early_stopping="never"))),
    Cancel("a"),
    Ask(7, "embed", {"prompt": [1, 2], "pooling": "mean"}),
]


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_messages_survive_any_cut(cuts: list[int]) -> None:
    data = b"".join(frame(message) for message in MESSAGES)
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    frames = to_engine()
    heard: list[ToEngine] = []
    for start, end in pairwise(borders):
        heard += frames.feed(data[start:end])
    assert heard == MESSAGES


def test_what_is_not_in_the_schema_is_not_taken() -> None:
    with pytest.raises(ValidationError):
        to_engine().feed(frame(Step([], Stats())))
    with pytest.raises(ValidationError):
        to_front().feed(frame(Cancel("a")))
    (step,) = to_front().feed(frame(Step([Event(id=3)], Stats())))  # type: ignore[arg-type]
    assert isinstance(step, Heard)
    with pytest.raises(ValidationError, match="Expected `str`"):
        next(step.events)
    request = Request(id="a", prompt=["no", "ids"], max_tokens=3)  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="Expected `int`"):
        to_engine().feed(frame(Submit(request)))


def test_numbers_that_are_none_cross() -> None:
    choice = Choice(index=0, tokens=[1], logprobs=[float("-inf")])
    event = Event(id="a", choices=[choice], prompt_logprobs=[None, (-0.5, 2, [(3, -0.25)])])
    (step,) = to_front().feed(frame(Step([event], Stats(steps=3, finished={"stop": 1}))))
    assert isinstance(step, Heard)
    assert list(step.events) == [event]
    assert step.stats.finished == {"stop": 1}


choices = st.builds(
    Choice,
    index=st.integers(0, 2),
    tokens=st.lists(st.integers(0, 9), max_size=2),
    text=st.text("ab", max_size=2),
    logprobs=st.lists(st.floats(-9, 0), max_size=2),
    finish=st.sampled_from([None, None, "stop"]),
)
events = st.builds(
    Event,
    id=st.just("a"),
    choices=st.lists(choices, max_size=3, unique_by=lambda choice: choice.index),
    tree=st.sampled_from([b"", b"{}"]),
)


def copied(event: Event) -> Event:
    (step,) = to_front().feed(frame(Step([event], Stats())))
    assert isinstance(step, Heard)
    return next(step.events)


@settings(deadline=None)
@given(said=st.lists(events, min_size=1, max_size=5), cut=st.integers(0, 5))
def test_it_does_not_matter_who_joins_events_and_when(said: list[Event], cut: int) -> None:
    whole = copied(said[0])
    for event in said[1:]:
        join(whole, copied(event))
    cut = min(cut, len(said) - 1)
    later = copied(said[cut])
    for event in said[cut + 1 :]:
        join(later, copied(event))
    parts = [copied(event) for event in said[:cut]] + [later]
    folded = parts[0]
    for part in parts[1:]:
        join(folded, part)
    assert asdict(folded) == asdict(whole)
    for choice in whole.choices:
        same = [c for event in said for c in event.choices if c.index == choice.index]
        assert choice.text == "".join(c.text for c in same)
        assert choice.tokens == [token for c in same for token in c.tokens]


def say(id: str, token: int, done: bool = False) -> Event:
    return Event(id=id, choices=[Choice(index=0, tokens=[token])], done=done)


def test_a_reader_finds_everything_since_in_one_event() -> None:
    registry = Registry(8)
    inbox = registry.open("a")
    woken: list[int] = []
    inbox.wake = lambda: woken.append(inbox.unread)
    assert registry.deliver([say("a", 1), say("b", 9)]) == []
    assert registry.deliver([say("a", 2)]) == []
    assert (woken, registry.unread) == ([1, 2], 2)
    event = inbox.take()
    assert event is not None
    assert event.choices[0].tokens == [1, 2]
    assert inbox.take() is None
    assert registry.unread == 0


@asynccontextmanager
async def listening(ear: Ear) -> AsyncIterator[socket.socket]:
    """The engine's end of a line that this ear is at."""
    ours, theirs = socket.socketpair()
    line, _ = await asyncio.get_running_loop().create_unix_connection(lambda: ear, sock=ours)
    with theirs:
        theirs.setblocking(False)
        yield theirs
    line.close()


def test_steps_that_come_at_once_are_heard_one_by_one() -> None:
    """The front lagged, not this reader, who keeps up when it is let."""
    registry, late = Registry(2), list[str]()
    said = [say("a", token, done=token == 999) for token in range(1000)]

    def hear(message: ToFront) -> None:
        assert isinstance(message, Heard)
        late.extend(registry.deliver(message.events))

    async def read() -> list[int]:
        inbox, woken, tokens = registry.open("a"), asyncio.Event(), list[int]()
        inbox.wake = woken.set
        while not inbox.done:
            await woken.wait()
            woken.clear()
            event = inbox.take()
            assert event is not None
            tokens += event.choices[0].tokens
        return tokens

    async def run() -> list[int]:
        async with listening(Ear(hear)) as theirs:
            data = b"".join(frame(Step([event], Stats())) for event in said)
            sending = asyncio.get_running_loop().sock_sendall(theirs, data)
            return (await asyncio.gather(read(), sending))[0]

    assert asyncio.run(run()) == list(range(1000))
    assert late == []


@pytest.mark.parametrize("data", [frame(Step([], Stats())), frame(Cancel("a"))])
def test_the_line_ends_with_what_cannot_be_heard(data: bytes) -> None:
    async def run() -> None:
        def hear(message: ToFront) -> None:
            raise RuntimeError("a bug")

        ear = Ear(hear)
        async with listening(ear) as theirs:
            await asyncio.get_running_loop().sock_sendall(theirs, 3 * data)
            await asyncio.wait_for(ear.over, 20)

    asyncio.run(run())


def test_who_lags_too_far_is_cut_off_once() -> None:
    registry = Registry(2)
    inbox = registry.open("a")
    assert registry.deliver([say("a", 1)]) + registry.deliver([say("a", 2)]) == []
    assert registry.deliver([say("a", 3)]) == ["a"]
    assert registry.deliver([say("a", 4, done=True)]) == []
    event = inbox.take()
    assert event is not None
    assert (event.code, event.done, event.choices[0].tokens) == ("slow_client", True, [1, 2, 3])
    assert registry.close(inbox) is False


def test_the_last_event_may_be_the_one_too_many() -> None:
    registry = Registry(1)
    inbox = registry.open("a")
    registry.deliver([say("a", 1)])
    assert registry.deliver([say("a", 2, done=True)]) == []
    event = inbox.take()
    assert event is not None
    assert event.error is None


def test_an_id_is_open_once_and_closing_tells_whether_it_still_runs() -> None:
    registry = Registry(8)
    inbox = registry.open("a")
    assert "a" in registry
    with pytest.raises(Duplicate):
        registry.open("a")
    assert registry.close(inbox) is True
    assert "a" not in registry
    assert registry.close(inbox) is True  # again, harmlessly
    registry.open("a")


def test_when_the_engine_is_gone_everybody_hears_it_once() -> None:
    registry = Registry(8)
    over, waits = registry.open("over"), registry.open("waits")
    registry.deliver([say("over", 1, done=True), say("waits", 2)])
    registry.fail(EngineDown("It died."))
    registry.fail(EngineDown("Again."))
    first, second = over.take(), waits.take()
    assert first is not None
    assert second is not None
    assert first.error is None
    assert (second.error, second.code) == ("It died.", "engine_down")
    assert second.choices[0].tokens == [2]


def test_a_heart_is_believed_for_as_long_as_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    mine = Heart()
    theirs = Heart(mine.fd)
    theirs.beat(20.0)
    now[0] += 19.0
    assert (mine.stale, mine.age) == (False, 19.0)
    now[0] += 2.0
    assert (mine.stale, mine.age) == (True, 21.0)
    theirs.beat()
    assert (mine.stale, mine.age) == (False, 0.0)
    mine.close()


def test_patience_knows_long_steps_from_short_ones() -> None:
    pace = Pace()
    assert pace.patience(1) == UNSEEN
    for _ in range(100):
        pace.saw(8, 0.01)
    assert pace.patience(8) == pace.patience(1) == FLOOR
    assert pace.patience(2048) == UNSEEN  # never seen
    pace.saw(2048, 10.0)
    assert pace.patience(2048) == pytest.approx(40.0)
    assert pace.patience(8) == FLOOR
    for _ in range(100):
        pace.saw(8, 2.0)
    assert pace.patience(8) == pytest.approx(40.0)  # 20 medians
