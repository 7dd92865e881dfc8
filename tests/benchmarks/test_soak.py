"""The soak: what it makes of what it sees, and a small run of what time does not decide."""

import asyncio
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.ask import ask, row
from benchmarks.soak.crowd import crowd, hasty, leavers, stayers
from benchmarks.soak.health import healthy
from benchmarks.soak.keys import application, bypasses, routes
from benchmarks.soak.leak import slopes
from benchmarks.soak.mutations import mutation
from benchmarks.soak.starts import BROKEN, broken, refused
from tests.server.rig import running
from tests.server.tiny import make


def test_health_is_the_worst_of_all_goals() -> None:
    good, slow = [0.001] * 400, [0.001] * 395 + [0.2] * 5
    (found,) = healthy([row("G2", "a", True, {}, good), row("G5", "b", True, {}, [])])
    assert (found["goal"], found["met"], found["health_max_ms"]) == ("G9", "True", 1.0)
    (found,) = healthy([row("G2", "a", True, {}, good), row("G3", "b", True, {}, slow)])
    assert (found["met"], found["health_p99_ms"]) == ("False", 200.0)
    assert "p99_above_50_ms G3" in found["found"]
    (found,) = healthy([row("G2", "a", True, {}, [*good, 1.5])])
    assert found["met"] == "False"
    assert healthy([row("G5", "b", True, {}, [])]) == []


def test_leaks_are_bytes_a_request_after_warming_up() -> None:
    warm = [[i, 10_000 * i, 5] for i in range(50)]
    steady = [[i, 500_000 + 70 * i, 5 + 3 * i] for i in range(50, 100)]
    assert slopes(warm + steady) == [pytest.approx(70), pytest.approx(3)]


def test_an_answer_is_read_from_the_wire() -> None:
    with running() as rig:
        whole = asyncio.run(ask(rig.port, max_tokens=4))
        assert (whole.status, whole.done, whole.error) == (200, True, "")
        assert whole.text
        rig.engine.fail_at = 2
        failed = asyncio.run(ask(rig.port, max_tokens=4))
        assert (failed.status, failed.done, failed.error) == (200, False, "engine_down")
        rig.engine.fail_at, rig.engine.delay = None, 0.1
        left = asyncio.run(ask(rig.port, leave=0.2, max_tokens=400))
        assert (left.done, left.error) == (False, "TimeoutError")
        rig.engine.delay = 0.0
        refused = asyncio.run(ask(rig.port, max_tokens=-1))
        assert (refused.status, refused.error) == (400, "invalid_value")
    assert asyncio.run(ask(rig.port)).error == "ConnectionRefusedError"


def test_a_crowd_leaves_stays_or_is_failed() -> None:
    with running() as rig:
        stayed = stayers(rig.port, 0.1, 30, 1)
        assert (stayed.clients, stayed.tokens, stayed.failed) == (3, 3, 0)
        assert 200 < stayers(rig.port, 0.1, 100, 50).tokens < 10 * 99
        rig.engine.delay = 0.05
        left = asyncio.run(crowd(leavers, rig.port, 0.5, 40, 0.2))
        assert (left.clients, left.failed) == (20, 0)
        assert left.tokens < 20 * 200
        gone = hasty(rig.port, 0.5, 40)
        assert (gone.clients, gone.failed) == (20, 0)
        assert 20 <= gone.tokens < 20 * 5
        rig.engine.delay, rig.engine.fail_at = 0.0, 2
        assert stayers(rig.port, 0.1, 30, 9).failed == 3
    with pytest.raises(ConnectionRefusedError):
        stayers(rig.port, 1, 1, 1)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n\r\n", None])
def test_a_crowd_that_gets_nothing_has_failed(
    said: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server that hangs up, that does so after a head, or that never answers."""
    monkeypatch.setattr("benchmarks.soak.crowd.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as other:
        for who in (partial(hasty), partial(stayers, tokens=5)):
            if said is not None:
                other.submit(_say_and_go, listener, said)
            crowd = who(listener.getsockname()[1], 0.1, 30)
            assert (crowd.clients, crowd.failed) == (3, 3)


def _say_and_go(listener: socket.socket, said: bytes) -> None:
    for _ in range(3):
        one, _ = listener.accept()
        with one:
            one.recv(1 << 16)
            one.sendall(said)


def test_every_route_of_the_application_is_tried() -> None:
    """And an open server is seen to be open."""
    found = routes(application())
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/version")} <= set(found)
    with running() as rig:
        tried, past = bypasses(rig.port, application(), ["x"])
    assert len(past) > tried // 10


def test_mutations_are_those_of_their_seed() -> None:
    assert mutation(7) == mutation(7)
    assert len({mutation(seed) for seed in range(500)}) > 450  # a few only take a field away


def test_a_start_that_succeeds_or_says_something_else_is_seen(tmp_path: Path) -> None:
    with broken(make(tmp_path), "no config") as folder:
        assert sorted(file.name for file in folder.iterdir()) == [
            "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
    assert asyncio.run(refused("--port", "x", says="--port is 'x'")) < 60
    assert asyncio.run(refused("--port", "x", says="abacus")) == float("inf")
    assert asyncio.run(refused("--help", says="")) == float("inf")
    assert len(BROKEN) >= 18


@pytest.mark.slow
def test_a_small_soak(tmp_path: Path) -> None:
    """T64, T80, T84 and G13 with a real engine; the exit status also judges times, this does not"""
    flags = ["--times", "1", "--mutations", "300", "--requests", "300"]
    command = [sys.executable, "-m", "benchmarks.soak", str(make(tmp_path)), *flags]
    done = subprocess.run(
        [*command, "--only", "G5", "G6", "G10", "G13"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("G5"), done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {row["goal"]: row["found"] for row in rows}
    assert list(found) == ["G5", "G6", "G10", "G13", "G9"]
    assert "cut 0, statuses [0], left 0" in found["G5"]
    assert "faults 0" in found["G6"]
    assert "failed 0" in found["G10"]
    assert "pages_live 0" in found["G10"]
    assert "bypasses 0, known [200, 200]" in found["G13"]
