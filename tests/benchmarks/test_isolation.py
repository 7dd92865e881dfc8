"""The benchmark of isolation runs, passes on a small model, and sees what it is there to see."""

import json
from pathlib import Path

import pytest

from benchmarks import isolation
from server.engine.request import Choice, Event
from tests.server.tiny import make


def test_hostile_neighbours_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """T34, G11: every kind of victim, beside neighbours of every kind, and of one that preempts."""
    flags = ["--tokens", "12", "--victims", "7", "--threads", "1", "--only", "go first", "all"]
    monkeypatch.setattr(isolation, "LONG", 0.1)  # of 2048 tokens, or the pages are never short
    monkeypatch.setattr("sys.argv", ["isolation", str(make(tmp_path)), *flags])
    assert isolation.main() == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["met"] is True
    assert [row["victims"] for row in said["rows"]] == [7, 7]
    assert sum(row["preemptions"] for row in said["rows"]) > 0
    assert all(row["cancelled"] > 0 for row in said["rows"])
    assert sum(row["tokens found"] for row in said["rows"]) > 0


def told(text: str = "ab", logprob: float = -1.0, prompt: float = -2.0) -> dict[str, Event]:
    choice = Choice(index=0, tokens=[1], text=text, logprobs=[logprob], finish="stop")
    scores: list[tuple[float, int, list[tuple[int, float]]] | None] = [None, (prompt, 1, [])]
    return {"0": Event(id="0", choices=[choice], done=True, prompt_logprobs=scores)}


def test_a_difference_is_seen() -> None:
    assert isolation.differences(told(), told()) == (0, 0)
    assert isolation.differences(told("ac"), told()) == (1, 0)
    assert isolation.differences(told(logprob=-1.5), told()) == (0, 0.5)
    assert isolation.differences(told(prompt=-2.25), told()) == (0, 0.25)
    failed = {"0": Event(id="0", error="It failed.", done=True)}
    assert isolation.differences(failed, told())[0] == 1
