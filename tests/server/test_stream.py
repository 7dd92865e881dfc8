"""How a stream leaves the front: past ASGI or through it, at once or late, in parts or broken."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Send
from uvicorn.protocols.http.flow_control import FlowControl

import server.protocol
from server.api import ask
from server.api.answer import Answer, Delta
from server.api.schema import ChatBody, CompletionBody
from server.api.shapes import ChatShape, CompletionShape, Shape
from server.api.stream import Reply, Stream
from server.api.turns import MOST
from server.api.work import Pool
from server.config import Settings
from server.engine.request import Choice, Event
from server.pipe import Pipe, Together
from server.protocol import Guarded
from tests.server.fakes import FakeEngine
from tests.server.rig import Rig, front, read_all, running

WHOLE: dict[str, Any] = {"prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 9, "temperature": 0}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as made:
        yield made


def until(true: Callable[[], Any]) -> None:
    tick, end = threading.Event(), time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never became true"
        tick.wait(0.005)


def send(rig: Rig, one: socket.socket, body: dict[str, Any]) -> None:
    raw = json.dumps({"stream": True} | body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    one.sendall(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)


def body_of(data: bytes) -> bytes:
    """The chunks of an answer, read as RFC 9112 says."""
    rest, body = data.partition(b"\r\n\r\n")[2], b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, end, rest = body + rest[:length], rest[length : length + 2], rest[length + 2 :]
        assert end == b"\r\n"
        if not length:
            assert rest == b""
            return body


def said(data: bytes) -> list[Any]:
    """Text by choice, and how it ended."""
    lines = [line[6:] for line in body_of(data).split(b"\n") if line.startswith(b"data: ")]
    texts: dict[int, str] = {}
    for line in lines[:-1]:
        for choice in json.loads(line)["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [sorted(texts.items()), lines[-1]]


def ask_all(rig: Rig, body: dict[str, Any]) -> bytes:
    with rig.connect() as one:
        send(rig, one, body)
        return read_all(one)


def test_through_asgi_alone_the_same_is_said(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server than ours offers no pipe."""
    offered = said(ask_all(rig, WHOLE))
    monkeypatch.setattr(Reply, "pipe", property(lambda _: None, lambda *_: None), raising=False)
    assert said(ask_all(rig, WHOLE)) == offered
    assert len(offered[0]) == 4
    assert offered[1] == b"[DONE]"


class Wire(asyncio.Transport):
    """Keeps what is written to it, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.sent[-1:] == [b"closed"]

    def close(self) -> None:
        self.sent.append(b"closed")

    def pause_reading(self) -> None:
        self.sent.append(b"paused")

    def resume_reading(self) -> None:
        self.sent.append(b"resumed")


def test_a_head_goes_with_the_first_bytes() -> None:
    wire = Wire()
    answer = Together(wire)
    for data in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"5", b"6"):
        answer.write(data)
    answer.close()
    assert wire.sent[1:] == [b"HTTP/1.1 200 OK\r\n\r\n5", b"6", b"closed"]
    broken = Together(wire)
    broken.write(b"HTTP/1.1 500 \r\n\r\n")
    broken.close()
    assert wire.sent[-2:] == [b"HTTP/1.1 500 \r\n\r\n", b"closed"]
    assert broken.is_closing()


def test_one_write_begins_an_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's, a plain one's and a refusal's."""
    wires: list[Wire] = []

    def recording(transport: asyncio.Transport) -> Together:
        wires.append(Wire())
        made = Together(wires[-1])
        put = wires[-1].write

        def write(data: Any) -> None:
            put(data)
            transport.write(data)

        monkeypatch.setattr(wires[-1], "write", write)
        monkeypatch.setattr(wires[-1], "close", transport.close)
        return made

    monkeypatch.setattr(server.protocol, "Together", recording)
    for body in (WHOLE | {"stream": True}, WHOLE | {"stream": False}, {"prompt": 7}):
        raw = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with rig.connect() as one:
            one.sendall(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
            read_all(one)
        begin = wires[-1].sent[0]
        assert begin.startswith(b"HTTP/1.1 ")
        assert begin.partition(b"\r\n\r\n")[2]


def test_a_client_that_lags_gets_the_same_in_fewer_pieces(rig: Rig) -> None:
    many = {"prompt": "x", "n": 8, "max_tokens": 2000, "logprobs": 3, "temperature": 0}
    prompt_one = said(ask_all(rig, many))
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(20)
        one.connect(("127.0.0.1", rig.port))
        send(rig, one, many)
        connections = rig.server.server_state.connections
        until(lambda: any(cast(Guarded, one).flow.write_paused for one in connections))
        assert said(read_all(one)) == prompt_one


def test_a_bug_in_mid_stream_ends_that_stream_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = CompletionShape.chunk

    def broken(self: Shape, delta: Delta) -> bytes:
        if self.asked.body.user == "unlucky" and not delta.first:
            raise RuntimeError("/secret/path.py")
        return chunk(self, delta)

    monkeypatch.setattr(CompletionShape, "chunk", broken)
    rig.engine.delay = 0.005
    with rig.connect() as one, rig.connect() as other:
        send(rig, one, WHOLE | {"user": "unlucky"})
        send(rig, other, WHOLE)
        failed, fine = read_all(one), read_all(other)
    rig.engine.delay = 0
    assert json.loads(body_of(failed).split(b"data: ")[-1])["error"]["code"] == "internal_error"
    assert b"secret" not in failed
    assert said(fine)[1] == b"[DONE]"
    assert not rig.engine.running


@pytest.mark.parametrize("stream", [True, False])
def test_who_left_before_is_not_asked_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """While its body was looked at elsewhere: the engine never hears of it."""
    asked, begun = len(rig.engine.seen), threading.Event()
    connections, run = rig.server.server_state.connections, Pool.run

    async def until_it_left(self: Pool, size: int, work: Callable[[], Any]) -> Any:
        begun.set()
        while connections:
            await asyncio.sleep(0)
        return await run(self, size, work)

    monkeypatch.setattr(Pool, "run", until_it_left)
    with rig.connect() as one:
        send(rig, one, WHOLE | {"stream": stream})
        assert begun.wait(10)
    until(lambda: not rig.server.server_state.tasks)
    assert len(rig.engine.seen) == asked


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_who_leaves_with_a_request_waiting_is_heard(
    rig: Rig, caplog: pytest.LogCaptureFixture, stream: bool, together: bool
) -> None:
    """And the answer under way is not written to a connection that is no more."""
    rig.engine.hold = asyncio.Event()
    raw = json.dumps(WHOLE | {"prompt": "Hi", "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    message = head + b"content-length: %d\r\n\r\n" % len(raw) + raw
    with rig.connect() as one:
        one.sendall(message * (1 + together))
        until(lambda: rig.engine.running)
        one.sendall(message * (1 - together))
        connection = cast(Guarded, next(iter(rig.server.server_state.connections)))
        until(lambda: connection.pipeline)
    until(lambda: not rig.engine.running and not rig.server.server_state.tasks)
    rig.engine.hold = None
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_pipe_tells_that_the_client_went() -> None:
    """Once, to who listens. The last piece of a large body stops the reading of more, and what is
    not read does not end."""
    wire, told = Wire(), list[str]()
    flow = FlowControl(wire)
    flow.pause_reading()
    pipe = Pipe(wire, flow)
    assert pipe.hear(lambda: told.append("first"))
    assert wire.sent == [b"paused", b"resumed"]
    pipe.hear(lambda: told.append("second"))
    pipe.lose()
    assert told == ["second"]
    assert not pipe.hear(lambda: told.append("third"))


def test_many_answers_begin_a_few_at_a_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may give hundreds their first word; meanwhile others have turns of the loop, too."""
    begun, begin = 0, Stream._send

    async def counted(self: Stream, send: Send, data: bytes, more: bool = True) -> None:
        nonlocal begun
        begun += not self.begun
        await begin(self, send, data, more)

    async def turns() -> list[int]:
        seen = [0]
        hold.set()
        while seen[-1] < len(held):
            await asyncio.sleep(0)
            seen.append(begun)
        return [now - before for before, now in pairwise(seen)]

    monkeypatch.setattr(Stream, "_send", counted)
    hold = rig.engine.hold = asyncio.Event()
    held = [rig.connect() for _ in range(5 * MOST)]
    for one in held:
        send(rig, one, WHOLE | {"prompt": "Hi"})
    until(lambda: len(rig.engine.running) == len(held))
    assert rig.loop is not None
    assert max(asyncio.run_coroutine_threadsafe(turns(), rig.loop).result(20)) <= MOST
    rig.engine.hold = None
    assert len({str(said(read_all(one))) for one in held}) == 1
    for one in held:
        one.close()


FRONT = front(Settings(), FakeEngine())
CHOICES = st.builds(
    Choice,
    index=st.integers(0, 1),
    tokens=st.lists(st.integers(0, 9), max_size=2),
    text=st.sampled_from(["", "a", "é\n"]),
    finish=st.sampled_from([None, None, None, "stop"]),
)
EVENTS = st.lists(
    st.lists(CHOICES, max_size=2, unique_by=lambda one: one.index), min_size=1, max_size=8
)
MOULDS = st.fixed_dictionaries(
    {},
    optional={
        "return_token_ids": st.just(True),
        "stream_options": st.sampled_from([{"include_usage": True}, {"include_usage": False}]),
        "cache_salt": st.text(max_size=3),
    },
)


def completion(fields: dict[str, Any]) -> CompletionShape:
    assert FRONT.served is not None
    body, _ = FRONT.parse(FRONT.served, CompletionBody, {"prompt": "Hi", "stream": True} | fields)
    return CompletionShape(Answer(ask.completion(FRONT.served, body, "id", "")), 1)


@settings(deadline=None)
@given(EVENTS, st.sampled_from([{}, {"return_token_ids": True}, {"logprobs": 0}, {"echo": True}]))
def test_a_word_is_all_that_its_event_says(
    said: list[list[Choice]], fields: dict[str, Any]
) -> None:
    quick, whole = completion({"n": 2} | fields), completion({"n": 2} | fields)
    for number, choices in enumerate(said):
        for choice in choices:
            choice.logprobs = [-1.0] * len(choice.tokens)
        event = Event(id="id", choices=choices, done=number == len(said) - 1)
        word = quick.answer.word(0, event)
        deltas = (quick if word is None else whole).answer.push(0, event)
        if word is None:
            assert whole.answer.push(0, event) == deltas
        else:
            assert quick.word(*word) == b"".join(map(whole.chunk, deltas))
    assert quick.answer.usage == whole.answer.usage
    assert [b.length for b in quick.answer.branches] == [b.length for b in whole.answer.branches]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), MOULDS, st.booleans())
def test_a_chunk_from_the_mould_is_the_chunk(
    texts: list[str], fields: dict[str, Any], chat: bool
) -> None:
    assert FRONT.served is not None
    messages = [{"role": "user", "content": "Hi"}]
    shape: Shape
    if chat:
        sent = {"stream": True, "messages": messages} | fields
        talk, _ = FRONT.parse(FRONT.served, ChatBody, sent)
        shape = ChatShape(Answer(ask.chat(FRONT.served, talk, "id", "")), 1)
    else:
        shape = completion(fields)
    for index, text in enumerate(texts):
        delta = Delta(index % 2, text)
        assert delta.plain
        assert shape.chunk(delta) == shape._chunk(delta)
        assert re.fullmatch(rb"data: [^\n]*\n\n", shape.chunk(delta))
