"""T84: 10,000 seeded mutations of valid requests. No 5xx, no hang, every error OpenAI's object."""

import json
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from benchmarks.soak.fuzz import by_hand, fault, send_all
from benchmarks.soak.mutations import VALID
from tests.server.rig import Rig, running

FAST, ALL = 1000, 10_000


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as made:
        made.engine.burst = 64
        yield made


def run(rig: Rig, seeds: range) -> Counter[int]:
    seen, faults = send_all(rig.port, seeds)
    assert not faults, faults[:5]
    assert rig.raw(b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    return seen


def test_what_is_mutated_is_valid(rig: Rig) -> None:
    connection = HTTPConnection("127.0.0.1", rig.port, timeout=30)
    for path, body in VALID:
        connection.request(
            "POST", path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        got = connection.getresponse()
        assert got.status == 200, (body, got.read())
        got.read()
    connection.close()


def test_a_thousand_mutations(rig: Rig) -> None:
    seen = run(rig, range(FAST))
    assert seen.total() == FAST
    assert seen[200] > FAST // 20  # some still are good
    assert seen[400] > FAST // 4  # and many are not


@pytest.mark.slow
def test_ten_thousand_mutations(rig: Rig) -> None:
    run(rig, range(FAST, ALL))


ERROR = {"message": "It is so.", "type": "invalid_request_error", "param": None, "code": "x"}


@pytest.mark.parametrize(
    ("status", "kind", "data"),
    [
        (500, "application/json", json.dumps({"error": ERROR})),
        (400, "application/json", "{}"),
        (400, "text/plain", "Bad Request"),
        (400, "application/json", json.dumps({"error": ERROR | {"message": ""}})),
        (400, "application/json", json.dumps({"error": ERROR | {"message": "x" * 9000}})),
        (400, "application/json", json.dumps({"error": ERROR | {"trace": "x"}})),
        (404, "application/json", json.dumps({"detail": "Not Found"})),
        (200, "application/json", json.dumps({"error": ERROR})),
        (200, "text/event-stream", "data: {}\n\n"),
    ],
)
def test_what_an_answer_should_not_be_is_seen(status: int, kind: str, data: str) -> None:
    assert fault(status, kind, data.encode())
    assert not fault(400, "application/json", json.dumps({"error": ERROR}).encode())
    assert by_hand(f"HTTP/1.1 {status} X\r\n\r\n{data}".encode())
