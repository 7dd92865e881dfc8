"""The routes over plain HTTP: shapes, limits, keys, and what no client library would send."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

import server.api.stream
from benchmarks.soak.keys import NO_KEY, OPEN, bypasses, routes
from benchmarks.soak.malformed import BODIES
from server.config import Settings
from server.engine.request import Choice, Event
from server.metrics import Meter, Metrics
from tests.server.rig import Rig, limits, read_all, running

COMPLETION: dict[str, Any] = {"prompt": "Hi", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as made:
        yield made


def call(
    rig: Rig,
    path: str,
    body: Any = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, and the body, decoded when it is JSON."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    said = {"content-type": "application/json"} if body is not None else {}
    connection = HTTPConnection("127.0.0.1", rig.port, timeout=20)
    connection.request(
        method or ("GET" if body is None else "POST"), path, raw, said | (headers or {})
    )
    got: HTTPResponse = connection.getresponse()
    data = got.read()
    connection.close()
    told = {name.lower(): value for name, value in got.getheaders()}
    decoded = json.loads(data) if "json" in told.get("content-type", "") else data
    return got.status, told, decoded


def check_error(body: Any, code: str | None = None) -> None:
    """OpenAI's error object, and nothing of ours inside. T46"""
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) <= 4096
    for secret in ("Traceback", "site-packages", ".py", "pydantic", "object at 0x"):
        assert secret not in error["message"]
    assert code is None or error["code"] == code


def events(data: bytes) -> list[Any]:
    blocks = [block for block in data.decode().split("\n\n") if block and not block.startswith(":")]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("data: ")]
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# Shapes


def test_a_stream_on_the_wire(rig: Rig) -> None:
    status, headers, data = call(rig, "/v1/completions", COMPLETION | {"stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in headers
    assert "server" not in headers
    assert data.endswith(b"data: [DONE]\n\n")
    assert data.count(b"[DONE]") == 1
    parts = events(data)
    assert parts[-1] == "[DONE]"
    assert all(part["object"] == "text_completion" for part in parts[:-1])


def test_a_failed_stream_ends_with_one_error_and_no_done(rig: Rig) -> None:
    """T60: what is left of a stream when the engine dies under it."""
    rig.engine.fail_at = 2
    status, _, data = call(rig, "/v1/completions", COMPLETION | {"stream": True})
    rig.engine.fail_at = None
    parts = events(data)
    assert status == 200
    assert [list(part) for part in parts if "error" in part] == [["error"]]
    check_error(parts[-1], "engine_down")
    assert b"[DONE]" not in data


def test_an_engine_that_fails_before_the_first_token_is_a_status(rig: Rig) -> None:
    rig.engine.fail_at = 0
    for stream in (False, True):
        status, headers, body = call(rig, "/v1/completions", COMPLETION | {"stream": stream})
        assert status == 503
        assert headers["retry-after"] == "2"
        check_error(body, "engine_down")
    rig.engine.fail_at = None


def test_a_bug_is_a_500_that_says_nothing(rig: Rig) -> None:
    rig.engine.raises = RuntimeError("/secret/path.py")
    for stream in (False, True):
        status, headers, body = call(rig, "/v1/completions", COMPLETION | {"stream": stream})
        assert status == 500
        assert headers["x-request-id"]
        check_error(body, "internal_error")
        assert "secret" not in body["error"]["message"]
    rig.engine.raises = None


def test_extensions_of_the_answer(rig: Rig) -> None:
    asked = {"return_token_ids": True, "prompt_logprobs": 1, "stop": "o", "max_tokens": 99}
    _, _, body = call(rig, "/v1/completions", COMPLETION | asked)
    choice = body["choices"][0]
    assert choice["prompt_token_ids"] == [257, 72, 105]
    assert bytes(choice["token_ids"]).decode().startswith(choice["text"])
    assert choice["stop_reason"] == "o"
    assert choice["prompt_logprobs"][0] is None
    assert set(choice["prompt_logprobs"][1]) == {"72"}
    assert choice["prompt_logprobs"][1]["72"]["decoded_token"] == "H"
    _, _, data = call(rig, "/v1/completions", COMPLETION | asked | {"stream": True})
    parts = [part["choices"][0] for part in events(data)[:-1]]
    told = [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part]
    assert told == [choice["prompt_token_ids"]]
    assert [id for part in parts for id in part["token_ids"]] == choice["token_ids"]
    messages = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    _, _, body = call(rig, "/v1/chat/completions", messages | {"return_token_ids": True})
    assert body["prompt_token_ids"][0] == 258
    assert len(body["choices"][0]["token_ids"]) == 2


def test_a_quiet_stream_says_that_it_lives(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments, which clients skip, until there is something to say: a beam search may be long."""
    monkeypatch.setattr(server.api.stream, "QUIET", 0.02)
    hold = rig.engine.hold = asyncio.Event()
    body = json.dumps(COMPLETION | {"stream": True}).encode()
    with rig.connect() as one:
        one.sendall(post("/v1/completions", body))
        data = b""
        while data.count(b": waiting\n\n") < 2:
            data += one.recv(4096)
        assert b"data:" not in data
        assert rig.loop is not None
        rig.loop.call_soon_threadsafe(hold.set)
        while b"[DONE]" not in data:
            data += one.recv(4096)
    rig.engine.hold = None


def test_continuous_usage(rig: Rig) -> None:
    asked = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    _, _, data = call(rig, "/v1/completions", COMPLETION | asked)
    counts = [part["usage"]["completion_tokens"] for part in events(data)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_beams_on_the_wire(rig: Rig) -> None:
    asked = {"num_beams": 3, "n": 2, "temperature": 0.5}
    _, _, body = call(rig, "/v1/completions", COMPLETION | asked)
    assert [choice["beam"]["rank"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][1]["beam"]["score"] == -1.0
    assert body["choices"][1]["beam"]["length"] == 4
    assert "no effect" in body["warnings"][0]
    _, _, data = call(rig, "/v1/completions", COMPLETION | asked | {"stream": True})
    parts = events(data)[:-1]
    assert "warnings" in parts[0]
    assert all("warnings" not in part for part in parts[1:])
    assert sum("beam" in part["choices"][0] for part in parts) == 2


def test_tokens_there_and_back(rig: Rig) -> None:
    for prefix in ("", "/v1"):
        _, _, body = call(rig, prefix + "/tokenize", {"prompt": "hej", "add_special_tokens": False})
        assert body["tokens"] == [104, 101, 106]
        assert body["count"] == 3
        _, _, body = call(rig, prefix + "/detokenize", {"tokens": [104, 101, 106]})
        assert body["prompt"] == "hej"
        _, _, body = call(rig, prefix + "/tokenizer_info")
        assert body["eos_token"] == "<eos>"
    chat = {"messages": [{"role": "user", "content": "x"}], "return_token_strs": True}
    _, _, body = call(rig, "/tokenize", chat)
    assert body["tokens"][0] == 258
    assert body["token_strs"][0] == "<|im|>"
    status, _, body = call(rig, "/tokenize", {})
    assert status == 400
    check_error(body, "invalid_value")
    status, _, body = call(rig, "/detokenize", {"tokens": [999]})
    assert status == 400
    check_error(body)


def test_embeddings_refuse_what_they_cannot(rig: Rig) -> None:
    for body, code in (
        ({"input": "x", "dimensions": 5}, "unsupported_parameter"),
        ({"input": "x" * 5000}, "context_length_exceeded"),
        ({"input": [[]]}, "invalid_value"),
    ):
        status, _, got = call(rig, "/v1/embeddings", body)
        assert status == 400
        check_error(got, code)
    assert call(rig, "/v1/embeddings", {"input": "x", "dimensions": 8})[0] == 200


# Paths, methods, ids


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "//v1/models", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404, "model_not_found"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
    ],
)
def test_the_frameworks_own_errors_are_openais(
    rig: Rig, method: str, path: str, status: int, code: str
) -> None:
    got, headers, body = call(rig, path, method=method)
    assert got == status
    assert headers["x-request-id"]
    assert "access-control-allow-origin" not in headers  # T56
    assert ("allow" in headers) == (status == 405)
    check_error(body, code)


def test_request_ids(rig: Rig) -> None:
    """T38, T57"""
    _, headers, _ = call(rig, "/version", headers={"X-Request-Id": "my.own-id_1"})
    assert headers["x-request-id"] == "my.own-id_1"
    for bad in ("a b", "a" * 65, "ü", "a;b"):
        _, headers, _ = call(
            rig, "/version", headers={"X-Request-Id": bad.encode().decode("latin-1")}
        )
        assert headers["x-request-id"] not in (bad, "")
    rig.engine.delay = 0.02
    with ThreadPoolExecutor(2) as pool:
        same = [
            pool.submit(call, rig, "/v1/completions", COMPLETION, None, {"X-Request-Id": "same"})
            for _ in range(2)
        ]
        assert [one.result()[0] for one in same] == [200, 200]
    rig.engine.delay = 0
    assert len({request.id for request in rig.engine.seen[-2:]}) == 2


# Bodies


@pytest.mark.parametrize(("raw", "says"), BODIES)
def test_bodies_that_are_refused(rig: Rig, raw: bytes, says: str) -> None:
    """T06, T13"""
    status, _, body = call(rig, "/v1/completions", raw)
    assert status == 400
    check_error(body, "invalid_json")
    assert says in body["error"]["message"]


def test_texts_that_are_odd_and_fine(rig: Rig) -> None:
    """T06"""
    for prompt in ("", "\x00", "a\u0301" * 500, "\U0001f331" * 100, "<eos>", " " * 999):
        status, _, _ = call(rig, "/v1/completions", COMPLETION | {"prompt": prompt})
        assert status == 200, prompt
    status, _, body = call(rig, "/v1/completions", COMPLETION | {"prompt": "x" * 10**6})
    assert status == 400
    check_error(body, "context_length_exceeded")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": ""},
        {"content-encoding": "gzip"},
    ],
)
def test_only_plain_json_is_taken(rig: Rig, headers: dict[str, str]) -> None:
    """T14, T22"""
    status, _, body = call(rig, "/v1/completions", COMPLETION, headers=headers)
    assert status == 415
    check_error(body, "unsupported_media_type")


def test_charset_and_range_are_harmless(rig: Rig) -> None:
    kind = {"content-type": 'Application/JSON; charset="UTF-8"', "range": "bytes=0-1"}
    assert call(rig, "/v1/completions", COMPLETION, headers=kind)[0] == 200


def test_a_body_too_large_is_refused_early() -> None:
    """T15: told or not, before all of it was read."""
    with running(limits(body_bytes=100_000)) as rig:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with rig.connect() as one:
            one.sendall(head + b"content-length: 999999999\r\n\r\n{")
            assert one.recv(4096).startswith(b"HTTP/1.1 413")
        with rig.connect() as one:
            one.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            one.sendall(b"ffff\r\n" + b" " * 0xFFFF + b"\r\n")
            one.sendall(b"ffff\r\n" + b" " * 0xFFFF + b"\r\n")
            assert one.recv(4096).startswith(b"HTTP/1.1 413")
        body = json.dumps(COMPLETION | {"prompt": "x" * 200_000}).encode()
        status, _, got = call(rig, "/v1/completions", body)
        assert status == 413
        check_error(got, "body_too_large")
        assert call(rig, "/version")[0] == 200


def test_health_answers_while_a_monster_is_parsed(rig: Rig) -> None:
    """T16: 300,000 keys, off the event loop."""
    keys = {f"k{i}": i for i in range(230_000)}
    message = {"role": "user", "content": "x", "x": 1}
    for monster in (keys, {"messages": [keys]}, {"messages": [message] * 80_000}):
        raw = json.dumps(monster).encode()
        assert len(raw) < 4 << 20
        assert slowest_health(rig, raw) < 1


def slowest_health(rig: Rig, raw: bytes) -> float:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(call, rig, "/v1/chat/completions", raw)
        answers = []
        while not asked.done():
            began = time.monotonic()
            assert call(rig, "/health/live")[0] == 200
            answers.append(time.monotonic() - began)
        assert asked.result()[0] == 400
    return max(answers, default=0)


# Leaving, stopping


def test_a_client_that_leaves_is_cancelled(rig: Rig) -> None:
    """T30: plain or streamed, before the first token or after."""
    for stream in (False, True):
        for hold in (False, True):
            rig.engine.cancelled.clear()
            rig.engine.delay = 0.01
            rig.engine.hold = asyncio.Event() if hold else None  # that nobody sets
            body = json.dumps(
                {"prompt": "x", "max_tokens": 4000, "stream": stream, "n": 3}
            ).encode()
            before = len(rig.engine.seen)
            with rig.connect() as one:
                one.sendall(post("/v1/completions", body))
                until(lambda before=before: len(rig.engine.seen) > before)
                if stream and not hold:
                    one.recv(100)
            until(lambda: rig.engine.cancelled)
            until(lambda: not rig.front.running)
    rig.engine.delay, rig.engine.hold = 0, None


def test_all_prompts_of_a_call_are_cancelled_together(rig: Rig) -> None:
    rig.engine.cancelled.clear()
    rig.engine.delay = 0.01
    body = json.dumps({"prompt": ["a", "b", "c"], "max_tokens": 4000, "stream": True}).encode()
    with rig.connect() as one:
        one.sendall(post("/v1/completions", body))
        one.recv(100)
    until(lambda: len(rig.engine.cancelled) == 3)
    rig.engine.delay = 0


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def until(true: Any, seconds: float = 5) -> None:
    """Wait for what another thread does; fail when it does not."""
    tick = threading.Event()
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        tick.wait(0.005)


def refused(rig: Rig) -> bool:
    try:
        rig.connect().close()
    except ConnectionRefusedError:
        return True
    return False


# Keys, hosts, health


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path]]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("first\nsecond\n")
    settings = Settings(
        api_keys=path,
        allowed_hosts=("127.0.0.1", "kvist.example"),
        host="0.0.0.0",
        shutdown_timeout=5,
    )
    with running(settings) as made:
        yield made, path


def test_every_route_but_the_probes_needs_a_key(locked: tuple[Rig, Path]) -> None:
    """T50, T51: enumerated from the application, with every way of not having a key."""
    rig, _ = locked
    every = routes(rig.server.config.app)
    assert len(every) >= 15
    for method, path in every:
        body: dict[str, Any] | None = {} if method == "POST" else None
        for headers in NO_KEY:
            status, told, got = call(rig, path, body, method, {"host": "127.0.0.1"} | headers)
            if path in OPEN:
                assert status == 200
                continue
            assert status == 401, (path, headers)
            assert told["www-authenticate"] == "Bearer"
            if method != "HEAD":
                check_error(got, "invalid_api_key")
            assert "first" not in json.dumps(got if isinstance(got, dict) else "")
        status, _, _ = call(rig, path, body, method, {"authorization": "bearer second"})
        assert status not in (401, 500)


def test_no_trick_opens_a_door(locked: tuple[Rig, Path], rig: Rig) -> None:
    """T50: of paths, hosts and methods; where no key is needed, the same attempts get in."""
    for made, expected in ((locked[0], False), (rig, True)):
        tried, past = bypasses(made.port, made.server.config.app, ["127.0.0.1"])
        assert tried > 300
        assert bool(past) == expected, past[:5]


def test_docs_are_off_beyond_loopback(locked: tuple[Rig, Path], rig: Rig) -> None:
    """T56"""
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert call(locked[0], path)[0] == 404
    assert call(rig, "/docs")[0] == 200
    page = call(rig, "/openapi.json")[2]
    assert "num_beams" in page["components"]["schemas"]["CompletionBody"]["properties"]
    posts = [path["post"] for path in page["paths"].values() if "post" in path]
    assert len(posts) == 5
    assert all("requestBody" in post for post in posts)


def test_keys_can_be_rotated(locked: tuple[Rig, Path]) -> None:
    rig, path = locked

    def status(key: str) -> int:
        return call(rig, "/v1/models", headers={"authorization": f"Bearer {key}"})[0]

    assert (status("first"), status("third")) == (200, 401)
    path.write_text("third\n")
    rig.front.keys.read()
    assert (status("first"), status("third")) == (401, 200)
    path.write_text("first\nsecond\n")
    rig.front.keys.read()


def test_keys_do_not_share_pages(locked: tuple[Rig, Path]) -> None:
    """T53: a salt for each key, and no key in it."""
    rig, _ = locked
    salts = []
    for key in ("first", "second", "first"):
        call(rig, "/v1/completions", COMPLETION, headers={"authorization": f"Bearer {key}"})
        salts.append(rig.engine.seen[-1].cache_salt)
    assert salts[0] == salts[2] != salts[1]
    assert "first" not in salts[0]


def test_hosts(locked: tuple[Rig, Path]) -> None:
    """T55"""
    rig, _ = locked
    key = {"authorization": "Bearer first"}
    for host, status in (
        ("kvist.example", 200), ("KVIST.example:8000", 200), ("127.0.0.1", 200),
        ("evil.example", 421), ("kvist.example.evil", 421), ("", 421), ("kvist.example@evil", 421),
    ):  # fmt: skip
        got, _, body = call(rig, "/v1/models", headers=key | {"host": host})
        assert got == status, host
        if status != 200:
            check_error(body, "wrong_host")
    assert call(rig, "/health/ready", headers={"host": "10.0.0.7"})[0] == 200


def test_health(rig: Rig) -> None:
    assert call(rig, "/health")[2]["status"] == "ready"
    assert call(rig, "/health/ready")[0] == call(rig, "/health/live")[0] == 200
    for state, age, live in (
        ("loading", 0, 200), ("hung", 11, 200), ("hung", 61, 503), ("down", 0, 200),
        ("failed", 0, 503),
    ):  # fmt: skip
        rig.engine.state, rig.engine.age = state, age
        assert call(rig, "/health/live")[0] == live
        for path in ("/health", "/health/ready"):
            status, _, body = call(rig, path)
            assert status == 503
            assert body["status"] == state
        status, _, body = call(rig, "/v1/completions", COMPLETION)
        assert status == 503
        check_error(body, "engine_down")
        assert body["error"]["message"] == "The model cannot be asked now: It died."
    rig.engine.state, rig.engine.age = "ready", 0


def test_metrics_have_vllms_names_and_a_fixed_number_of_series(rig: Rig) -> None:
    """T81: nothing that a client says makes a series."""
    call(rig, "/v1/completions", COMPLETION | {"model": "tiny"})
    before = call(rig, "/metrics")[2].decode()
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket", "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total", "vllm:num_preemptions_total", "vllm:request_success_total",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:engine_healthy",
        "vllm:cache_config_info", "gen_ai_server_request_duration_seconds_bucket",
        "requests_rejected_total", "engine_restarts_total", "engine_heartbeat_age_seconds",
        "vllm:request_queue_time_seconds_bucket", "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_inference_time_seconds_bucket", "vllm:request_decode_time_seconds_bucket",
        "event_loop_lag_seconds_bucket", "unread_events", "nan_rows_total", "build_info", "pages",
        'kernels{kernel="sample",way="torch"} 1.0',
    ):  # fmt: skip
        assert name in before, name
    for i in range(20):
        call(rig, f"/path{i}", headers={"x-request-id": f"id{i}"})
        call(rig, "/v1/completions", COMPLETION | {"model": f"m{i}"})
        call(rig, "/v1/completions", COMPLETION | {"user": f"u{i}", "cache_salt": f"s{i}"})
    after = call(rig, "/metrics")[2].decode()
    new = {line.rsplit(" ", 1)[0] for line in after.splitlines()} - {
        line.rsplit(" ", 1)[0] for line in before.splitlines()
    }
    assert all("not_found" in line or line.startswith("# ") for line in new), new
    assert len(after.splitlines()) < 2000


def test_a_requests_times_add_up() -> None:
    """Its wait is what the engine says; what is left until the first token is the prefill."""
    times = iter([10.0, 11.0, 12.5, 13.0, 15.0, 16.0])  # arrival, sent, three events, the end
    metrics = Metrics("tiny", "test")
    meter = Meter(metrics, "chat", lambda: next(times))
    meter.asked(3, 1, 9)
    for number in range(3):
        choices = [Choice(index=0, tokens=[7])]
        first = not number
        meter.event(Event(id="a", choices=choices, prompt_tokens=3 * first, queued=0.25 * first))
    meter.end()
    labels = {"model_name": "tiny", "engine": "0"}
    said = {
        name: metrics.registry.get_sample_value(f"vllm:{name}_seconds_sum", labels)
        for name in (
            "time_to_first_token", "inter_token_latency", "request_queue_time",
            "request_prefill_time", "request_decode_time", "request_inference_time",
            "e2e_request_latency",
        )
    }  # fmt: skip
    assert list(said.values()) == [2.5, 2.5, 0.25, 1.25, 2.5, 3.75, 6.0]


def test_the_sizes_of_steps_are_a_histogram(rig: Rig) -> None:
    page = call(rig, "/metrics")[2].decode().splitlines()
    name, labels = "vllm:iteration_tokens_total", 'engine="0",model_name="tiny"'
    told = [line for line in page if line.startswith(name)]
    expected = [("1.0", 1), ("2.0", 3), ("4.0", 6), ("+Inf", 6)]
    counts = [
        f'{name}_bucket{{engine="0",le="{le}",model_name="tiny"}} {count}.0'
        for le, count in expected
    ]
    assert told == [*counts, f"{name}_count{{{labels}}} 6.0", f"{name}_sum{{{labels}}} 21.0"]


# Stopping


def test_a_drain_lets_running_answers_finish() -> None:
    """T64: readiness goes at once, new connections are refused, streams run to their end."""
    with running() as rig:
        rig.engine.delay = 0.01
        body = json.dumps({"prompt": "x", "max_tokens": 30, "stream": True}).encode()
        with rig.connect() as one:
            one.sendall(post("/v1/completions", body))
            first = one.recv(100)
            rig.server.should_exit = True
            until(lambda: rig.front.draining)
            until(lambda: refused(rig))
            assert (first + read_all(one)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_drain_has_an_end() -> None:
    """T65: what is not finished then is told so."""
    with running(Settings(shutdown_timeout=0.1)) as rig:
        rig.engine.delay = 0.05
        body = {"prompt": "x", "max_tokens": 4000}
        with rig.connect() as streamed, rig.connect() as plain:
            streamed.sendall(post("/v1/completions", json.dumps(body | {"stream": True}).encode()))
            plain.sendall(post("/v1/completions", json.dumps(body).encode()))
            until(lambda: len(rig.engine.seen) == 2)
            data = streamed.recv(100)
            rig.server.should_exit = True
            data += read_all(streamed)
            assert b"[DONE]" not in data
            assert b'"code":"draining"' in data
            got = read_all(plain)
            assert got.startswith(b"HTTP/1.1 503")
            assert b'"code":"draining"' in got
