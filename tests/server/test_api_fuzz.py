"""T84: 10,000 seeded mutations of valid requests. No 5xx, no hang, every error OpenAI's object."""

import json
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from tests.server.mutations import VALID, mutation
from tests.server.rig import Rig, running

FAST, ALL = 1000, 10_000


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as made:
        made.engine.burst = 64
        yield made


def send(connection: HTTPConnection, path: str, raw: bytes) -> tuple[int, str, bytes]:
    connection.request("POST", path, raw, {"content-type": "application/json"})
    got = connection.getresponse()
    return got.status, got.getheader("content-type") or "", got.read()


def check(status: int, kind: str, data: bytes, seed: int) -> None:
    assert status < 500, (seed, mutation(seed), data)
    if status != 200:
        body = json.loads(data)
        assert set(body) == {"error"}, seed
        assert set(body["error"]) == {"message", "type", "param", "code"}, seed
        assert body["error"]["message"], seed
        assert len(data) < 8192, seed
    elif kind.startswith("text/event-stream"):
        assert data.endswith(b"data: [DONE]\n\n"), seed
    else:
        assert "error" not in json.loads(data), seed


def run(rig: Rig, seeds: range) -> Counter[int]:
    seen: Counter[int] = Counter()
    connection = HTTPConnection("127.0.0.1", rig.port, timeout=30)
    for seed in seeds:
        status, kind, data = send(connection, *mutation(seed))
        check(status, kind, data, seed)
        seen[status] += 1
    connection.close()
    assert rig.raw(b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    return seen


def test_what_is_mutated_is_valid(rig: Rig) -> None:
    connection = HTTPConnection("127.0.0.1", rig.port, timeout=30)
    for path, body in VALID:
        status, _, data = send(connection, path, json.dumps(body).encode())
        assert status == 200, (body, data)
    connection.close()


def test_a_thousand_mutations(rig: Rig) -> None:
    seen = run(rig, range(FAST))
    assert seen[200] > FAST // 20  # some still are good
    assert seen[400] > FAST // 4  # and many are not


@pytest.mark.slow
def test_ten_thousand_mutations(rig: Rig) -> None:
    run(rig, range(FAST, ALL))
