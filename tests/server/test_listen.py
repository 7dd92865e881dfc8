"""Below the application: what raw sockets can do to the listener."""

import asyncio
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.malformed import GET, HEADS, NEXT, POST, SMUGGLED
from server.config import Settings
from tests.server.rig import Rig, limits, read_all, running


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as made:
        yield made


def answers(data: bytes) -> list[int]:
    """The status of each answer in these bytes."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


def heard(rig: Rig, message: bytes) -> bytes:
    """All that comes back for this until the server closes, while the client stays."""
    with rig.connect() as one:
        one.sendall(message)
        return read_all(one)


def check_object(data: bytes) -> Any:
    body = json.loads(data.partition(b"\r\n\r\n")[2])
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert b"connection: close" in data.lower()
    return body["error"]["code"]


CODED = [
    POST + b"transfer-encoding: gzip, chunked\r\n\r\n",
    POST + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n",
    POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
    POST + b"transfer-encoding: chunked, chunked\r\n\r\n",
    POST + b"transfer-encoding: identity\r\n\r\n",
    POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n",
]


@pytest.mark.parametrize("message", CODED)
def test_a_body_in_another_coding_is_not_read_as_chunks(rig: Rig, message: bytes) -> None:
    seen = len(rig.engine.seen)
    data = rig.raw(message + b'F\r\n{"prompt": "x"}\r\n0\r\n\r\n' + NEXT)
    assert answers(data) == [400]
    assert check_object(data) == "bad_http_message"
    assert len(rig.engine.seen) == seen


def test_chunks_are_spelled_as_one_likes(rig: Rig) -> None:
    head = POST + b"transfer-encoding: Chunked \r\nconnection: close\r\n\r\n"
    assert answers(heard(rig, head + b'F\r\n{"prompt": "x"}\r\n0\r\n\r\n')) == [200]


@pytest.mark.parametrize("stream", [True, False])
def test_an_old_client_gets_no_chunks(rig: Rig, stream: bool) -> None:
    """HTTP/1.0 knows none: the end of the connection is the end of a stream, kept alive or not."""
    asked = {"prompt": "x", "max_tokens": 40, "temperature": 0, "stream": stream}
    body = json.dumps(asked).encode()
    said = {}
    for version in (b"1.0", b"1.1"):
        head = POST.replace(b"1.1", version) + b"content-length: %d\r\n" % len(body)
        kept = b"keep-alive" if version == b"1.0" else b"close"
        data = heard(rig, head + b"connection: " + kept + b"\r\n\r\n" + body)
        assert answers(data) == [200]
        head, _, rest = data.partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert (b"transfer-encoding: chunked" in head) == (stream and version == b"1.1")
        said[version] = re.findall(rb'"text":"[^"]*"', rest)
        if version == b"1.0" and stream:
            assert b"content-length" not in head
            assert rest.startswith(b"data: {")
            assert rest.endswith(b"}\n\ndata: [DONE]\n\n")
            assert all(part.startswith(b"data: ") for part in rest.strip().split(b"\n\n"))
    assert said[b"1.0"] == said[b"1.1"]
    assert (len(said[b"1.0"]) > 9) == stream


@pytest.mark.parametrize("message", SMUGGLED)
def test_what_two_readers_could_read_differently_gets_one_400(rig: Rig, message: bytes) -> None:
    """T23: one answer, never two, and the connection ends."""
    data = rig.raw(message)
    assert answers(data) == [400]
    assert check_object(data) in ("bad_http_message", "invalid_json")


def test_a_bad_message_after_a_good_one(rig: Rig) -> None:
    data = rig.raw(GET + b"\r\n" + GET + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n")
    assert answers(data) in ([200], [200, 400])
    assert data.count(b'"status":"live"') == 1


def test_a_bad_message_during_an_answer_lets_it_finish(rig: Rig) -> None:
    rig.engine.delay = 0.01
    body = json.dumps({"prompt": "x", "max_tokens": 10, "stream": True}).encode()
    with rig.connect() as one:
        one.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        data = one.recv(100)
        one.sendall(b"\x00\x01\x02 not http\r\n\r\n")
        data += read_all(one)
    rig.engine.delay = 0
    assert answers(data) == [200]
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_what_waits_behind_a_bad_message_does_not_keep_the_connection(rig: Rig) -> None:
    """The answer under way says that it is the last, and is. Else `heard` would wait for long."""
    rig.engine.delay = 0.01
    body = json.dumps({"prompt": "x", "max_tokens": 10}).encode()
    asked = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    data = heard(rig, asked + GET + b"\r\n" + b"\x00bad\r\n\r\n")
    rig.engine.delay = 0
    assert answers(data) == [200]
    assert b"\r\nconnection: close\r\n" in data
    assert b'"completion_tokens":10' in data


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
def test_another_http_is_refused(rig: Rig, version: bytes) -> None:
    """Its client would not know where a stream ends."""
    body = json.dumps({"prompt": "x", "max_tokens": 10, "stream": True}).encode()
    asked = POST.replace(b"1.1", version) + b"connection: keep-alive\r\n"
    data = heard(rig, asked + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert answers(data) == [400]
    assert check_object(data) == "bad_http_message"


def test_only_a_new_client_is_told_to_continue(rig: Rig) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    for version, statuses in ((b"1.0", [200]), (b"1.1", [100, 200])):
        asked = POST.replace(b"1.1", version) + b"expect: 100-continue\r\nconnection: close\r\n"
        data = heard(rig, asked + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert answers(data) == statuses


def test_pipelined_requests_are_answered_in_order(rig: Rig) -> None:
    bodies = [
        json.dumps({"prompt": "x", "max_tokens": n, "temperature": 0}).encode() for n in (9, 1)
    ]
    asked = [POST + b"content-length: %d\r\n\r\n" % len(body) + body for body in bodies]
    with rig.connect() as one:
        one.sendall(b"".join(asked) + GET + b"connection: close\r\n\r\n")
        data = read_all(one)
    assert answers(data) == [200, 200, 200]
    assert data.index(b'"completion_tokens":9') < data.index(b'"completion_tokens":1,')


@pytest.mark.parametrize(("message", "status", "code"), HEADS)
def test_heads_have_a_size(rig: Rig, message: bytes, status: int, code: str) -> None:
    """T20"""
    data = rig.raw(message)
    if data:  # a reset may overtake the answer when the client still sends
        assert answers(data) == [status]
        assert check_object(data) == code


def test_chunk_bombs(rig: Rig) -> None:
    """T21: a million chunks of one byte are a body like any other."""
    with rig.connect() as one:
        one.sendall(POST + b"transfer-encoding: chunked\r\n\r\n")
        got = b""
        try:
            for _ in range(100):
                one.sendall(b"1\r\n \r\n" * 10_000)
            one.sendall(b"0\r\n\r\n")
            got = one.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert not got or answers(got) == [400]


def test_unknown_upgrades_are_ignored(rig: Rig) -> None:
    """Java's client offers h2c with each request."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n"
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    with rig.connect() as one:
        one.sendall(POST + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert answers(one.recv(65536)) == [200]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"POST /v1/comp",
        POST,
        POST + b"content-length: 10\r\n\r\n",
        POST + b"content-length: 10\r\n\r\n{",
        POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
        GET + b"\r\n",
        GET + b"\r\n" + GET,
    ],
)
def test_slow_and_idle_connections_end(sent: bytes) -> None:
    """T24: headers, bodies and silence have a deadline; those who keep it are not touched."""
    with running(limits(receive_timeout=0.15, idle_timeout=0.3)) as rig:
        rig.engine.delay = 0.02
        body = json.dumps({"prompt": "x", "max_tokens": 20, "stream": True}).encode()
        with rig.connect() as slow, rig.connect() as good:
            good.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
            slow.sendall(sent)
            data = read_all(slow)  # ends, or the socket's own timeout fails the test
            late = [408] if sent.strip() and not sent.endswith(GET + b"\r\n") else []
            assert answers(data) == ([200] if b"GET" in sent else []) + late
            if late:
                assert b"request_timeout" in data
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                got += good.recv(65536)
            assert got.count(b"[DONE]") == 1


def test_a_trickle_does_not_put_the_deadline_off() -> None:
    def closed(one: socket.socket) -> bool:
        try:
            one.sendall(b"x")
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    with running(limits(receive_timeout=0.3)) as rig, rig.connect() as one:
        until(lambda: closed(one))


def test_a_client_that_reads_nothing_is_given_up() -> None:
    """T25: its connection ends, its request is cancelled, its neighbours never wait."""
    with running(limits(unread_seconds=0.3)) as rig:
        rig.engine.burst = 500
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "n": 8, "logprobs": 5}).encode()
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", rig.port))
        with one:
            stream = body.replace(b"{", b'{"stream": true, ', 1)
            one.sendall(POST + b"content-length: %d\r\n\r\n" % len(stream) + stream)
            until(lambda: rig.engine.seen)
            until(lambda: not rig.front.running)
            until(lambda: not rig.server.server_state.connections)
        assert rig.raw(GET + b"\r\n").startswith(b"HTTP/1.1 200")


def test_more_connections_than_allowed_are_told_so() -> None:
    """T79"""
    with running(limits(connections=5)) as rig, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(rig.connect())
        until(lambda: len(rig.server.server_state.connections) == 5)
        with rig.connect() as one:
            data = read_all(one)
        assert answers(data) == [429]
        assert check_object(data) == "rate_limit_exceeded"
    with running(limits(connections=5)) as rig:
        assert rig.raw(GET + b"\r\n").startswith(b"HTTP/1.1 200")


def test_early_answers_do_not_lose_the_rest(rig: Rig) -> None:
    """An error that needs no body is heard although the client still sends it."""
    body = b"x" * (8 << 20)
    with rig.connect() as one:
        one.sendall(POST + b"content-length: %d\r\n\r\n" % len(body))
        one.sendall(body)
        data = one.recv(65536)
        assert answers(data) == [413]
        one.sendall(GET + b"connection: close\r\n\r\n")
        assert answers(read_all(one)) == [200]


def test_a_turn_of_the_loop_takes_many_connections(rig: Rig) -> None:
    """Or they queue as long as streams keep it busy; libuv by itself takes one."""
    held: list[socket.socket] = []

    async def turns() -> int:
        known, count = len(rig.server.server_state.connections), 0
        held.extend(rig.connect() for _ in range(12))
        while len(rig.server.server_state.connections) < known + 12:
            await asyncio.sleep(0)
            count += 1
        return count

    rig.raw(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")  # it runs
    assert rig.loop is not None
    assert asyncio.run_coroutine_threadsafe(turns(), rig.loop).result(20) < 12
    for one in held:
        one.close()


def test_ports_can_be_asked_again_at_once() -> None:
    """A restart does not wait for old connections to be forgotten."""
    with running(Settings(shutdown_timeout=5)) as rig:
        rig.raw(GET + b"\r\n")
        port = rig.port
    from server.listen import bind

    with bind("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


def test_tls(tmp_path: Path) -> None:
    """With a certificate the port speaks TLS, and nothing else."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    flags = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run([openssl, *flags.split(), *names, *files], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(cert))
    with running(Settings(tls_cert=cert, tls_key=key, shutdown_timeout=5)) as rig:
        with rig.connect() as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as one:
            one.sendall(GET + b"connection: close\r\n\r\n")
            assert answers(one.recv(4096)) == [200]
        assert answers(rig.raw(GET + b"\r\n")) == []


def until(true: Any, seconds: float = 8) -> None:
    tick, end = threading.Event(), time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        tick.wait(0.005)
