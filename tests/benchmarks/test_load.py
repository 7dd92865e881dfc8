"""Latency and throughput: what comes over HTTP is counted, and loads are what they say."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.clients import Answer, Crowd, Outside
from benchmarks.costs import Costs
from benchmarks.limits import Limits
from benchmarks.throughput import BURST, arrivals, draw
from kernels import build


@pytest.mark.parametrize("burst", [1, BURST])
def test_requests_come_as_often_as_asked(burst: int) -> None:
    due = arrivals(4.0, 2000, burst, 3)
    assert due == sorted(due)
    assert len(due) == 8000
    assert len(due) / due[-1] == pytest.approx(4.0, rel=0.1)
    assert len(set(due)) == 8000 / burst


def test_prompts_share_their_first_half_only_if_asked() -> None:
    own, shared = (np.array(draw(500, 64, wish, 6, 1)) for wish in (False, True))
    assert len({tuple(row) for row in shared[:, :32].tolist()}) == 1
    assert len({tuple(row) for row in own[:, :32].tolist()}) == 6
    assert len({tuple(row) for row in shared.tolist()}) == 6


class Slow(Crowd):
    """Answers one request at a time, in a second of its own clock."""

    time, most = 0.0, 0

    def now(self) -> float:
        return self.time

    def ask(self, number: int) -> None:
        self.most = max(self.most, number + 1 - self.done)

    def hear(self, pause: float | None) -> None:
        if self.done == len(self.answers):
            self.time += pause or 0.0
            return
        self.time += 1.0
        self.answers[self.done].at.append(self.time)
        self.done += 1


def test_a_closed_loop_has_so_many_at_once_and_an_open_one_waits_for_nobody() -> None:
    closed = Slow([[1]] * 6, 1)
    assert [answer.first for answer in closed.run(2)] == [1, 2, 2, 2, 2, 2]
    assert (closed.most, closed.seconds) == (2, 6.0)
    opened = Slow([[1]] * 4, 1)
    waits = [answer.first for answer in opened.run(0, [0.5, 0.6, 0.7, 9.0])]
    assert waits == pytest.approx([1.0, 1.9, 2.8, 1.0])  # since they were due, not since they came
    assert opened.seconds == 10.0


def test_only_gaps_between_two_moments_count() -> None:
    answer = Answer(0.0, 5, [1.0, 2.0, 4.0, 7.0, 11.0])
    assert answer.gaps(2.0, 7.0) == [2.0, 3.0]
    assert answer.pace == 2.5


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_tokens_are_counted_wherever_packets_end(cut: int) -> None:
    """The first event stands behind the head; one event can bring several tokens."""
    events = [{"choices": [{"token_ids": ids}]} for ids in ([7], [8, 9])] + [{"choices": []}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    raw = ("HTTP/1.1 200 OK\r\n\r\n" + body).encode()
    answers = asked_of(raw[:cut], raw[cut:], clients=2)
    assert [answer.tokens for answer in answers] == [3, 3]
    assert all(answer.at == sorted(answer.at) and answer.at for answer in answers)


def test_a_refusal_is_not_an_answer() -> None:
    with pytest.raises(RuntimeError, match=r"0 tokens came instead of 3.*429"):
        asked_of(b'HTTP/1.1 429 No\r\n\r\n{"error": {}}', clients=1)


def asked_of(*parts: bytes, clients: int) -> Sequence[Answer]:
    """What a crowd understands of a server that says this to each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(clients):
                one, _ = listener.accept()
                with one:
                    one.recv(1 << 16)
                    for part in parts:
                        one.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        crowd = Outside(listener.getsockname()[1], [[1]] * clients, 3)
        try:
            return crowd.run(clients)
        finally:
            thread.join()


@pytest.mark.parametrize(("rows", "bound"), [(1, 500 / 1e3), (64, 2 * 64 * 500 / 4e4)])
def test_a_step_is_bound_by_reading_or_by_products(rows: int, bound: float) -> None:
    costs = Costs(layers=400, head=100, width=1.0, kept=0, kind="int8")
    ceiling = Limits(read=1e3, float32=1.0, bfloat16=1.0, int8=4e4, launch=0)
    assert costs.step(ceiling, rows, 1, 10) == pytest.approx(bound)
    assert costs.whole(ceiling, rows, 1, 3) == pytest.approx(3 * bound)


def run(module: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--threads", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_throughput_of_the_embedded_model() -> None:
    few = ["--clients", "2", "--shares", "0.5", "--seconds", "1", "--rounds", "1"]
    found = run("throughput", *few)
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 3  # ways, prefixes, loads
    assert {row["over"] for row in rows} == {"offline", "http"}
    assert all(0 <= row["goodput/s"] <= row["done/s"] for row in rows)
    kept, size = ("float16", 8) if build.here() else ("float32", 16)
    assert f"4.0 million parameters in {kept}; a step reads {size} MB" in found["said"][0]
    assert all(row["tok/s"] > 0 and row["first p50 ms"] > 0 for row in rows)


@pytest.mark.slow
def test_latency_of_the_embedded_model() -> None:
    rows = run("latency", "--prompts", "16", "--batches", "1", "2", "--rounds", "1")["rows"]
    assert [(row["over"], row["batch"]) for row in rows] == [
        (way, batch) for way in ("offline", "http") for batch in (1, 2)
    ]
    assert all(row["next p5"] <= row["next p50 ms"] <= row["next p99"] for row in rows)
