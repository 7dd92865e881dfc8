"""The contest: everyone computes the same, waits in silence, and is listed with a reason if not."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.limits import BYTES, Limits, Memory
from benchmarks.peers import BOTH, PEERS, Entry, Work, check
from benchmarks.peers.contest import Seat, contest, least
from benchmarks.peers.remote import Failed, Remote, convert, source
from benchmarks.peers.source import SHAPES, weights
from benchmarks.peers.tensors import Source

WORDS = SHAPES["check"]["vocabulary"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the noise is written once."""
    return tmp_path_factory.mktemp("peers")


def compare(work: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compare", "--shape", "check", "--threads", "1"]
    done = subprocess.run(
        [*command, "--work", str(work), *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_kvist_says_what_transformers_say(work: Path) -> None:
    found = compare(work, "--check", "--engines", "kvist", "transformers")
    assert [(row["engine"], row["equal"], row["beam 4 equal"]) for row in found["rows"]] == [
        ("kvist", 1.0, True),
        ("transformers", 1.0, True),
    ]


@pytest.mark.parametrize(("wrong", "status"), [(2, 0), (3, 1)])
def test_another_text_is_noticed(
    wrong: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [[stream] for stream in range(check.WORK.streams)]
    other = [[-1]] * wrong + right[wrong:]
    texts = {"transformers": right, "kvist": other}
    monkeypatch.setattr(check, "source", lambda *_: Path())
    monkeypatch.setattr(
        check, "said", lambda engine, *_: {check.WORK: texts[engine], check.BEAM: [[0]]}
    )
    given = Namespace(shape="check", engines=["kvist"], save=False, plot=None)
    assert check.check(given, Path()) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["equal"] == 1 - wrong / 8


def test_who_is_not_here_is_listed(work: Path) -> None:
    few = ["--precisions", "int8", "--cases", "decode", "--shorter", "16", "--rounds", "2"]
    found = compare(work, *few, "--engines", "kvist", "transformers", "ctranslate2")
    assert found["missing"]["transformers int8"] == "it has no int8 here"
    here = {one.name for one in metadata.distributions()}
    assert ("ctranslate2" in found["missing"]) == ("ctranslate2" not in here)
    row = found["rows"][0]
    assert row["engine"] == "kvist"
    assert row["tok/s"] > 0
    assert 0 < row["of limit"] < 1
    assert found["versions"]["transformers"] == metadata.version("transformers")


def test_an_engine_is_still_between_its_turns(work: Path) -> None:
    remote = Remote("kvist", "float32", source("check", work), 1, WORDS)
    try:
        said = remote.ask(Work(streams=2, prompt=8, new=3), 100)
        assert [len(line) for line in said["tokens"]] == [3, 3]
        assert said["wall"] > 0
        how = os.WSTOPPED | os.WEXITED | os.WNOWAIT  # waits until the signal has arrived
        became = os.waitid(os.P_PID, remote.process.pid, how)
        assert became
        assert became.si_code == os.CLD_STOPPED
    finally:
        remote.close()
    assert not remote.alive


def test_a_converter_that_fails_gives_its_last_words(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "nobody", Entry("nobody", BOTH))
    with pytest.raises(Failed, match=r"status 1: ModuleNotFoundError.*nobody"):
        convert("nobody", source("check", work), "int8", work)


def test_a_case_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Seat, work: Work, patience: float) -> tuple[float, float]:
        if work.beams > 1:
            raise Failed("it has no beam search")
        return work.new / 10, 0.0

    monkeypatch.setattr(Seat, "_ask", answer)
    monkeypatch.setattr(Memory, "_read", lambda self: 0.5)
    one = Seat("kvist", "int8", Path(), 1, WORDS)
    cases = {"beam 4": Work(beams=4), "decode": Work(new=11)}
    for stay in (True, False):
        contest([one], cases, 2, stay, 1.0, Memory(1))
    assert one.why == {"beam 4": "it has no beam search"}
    read = 2 * BYTES  # a second
    assert one.taken == {"decode": [(1.0, 0.0, read)] * 4}  # without the time of the first token


def test_weights_are_those_that_the_source_has(work: Path) -> None:
    layers = [array for name, _, array in Source(source("check", work)) if "." in name]
    assert weights(SHAPES["check"]) == sum(array.size for array in layers if array.ndim == 2)


@pytest.mark.parametrize(
    ("engine", "shape", "form", "expected"),
    [
        ("kvist", "llama-0.5b", "int8", 41),
        ("kvist", "llama-0.5b", "float32", 20.5),  # stays in bfloat16
        ("kvist", "llama-0.5b-float32", "float32", 10),
        ("ctranslate2", "llama-0.5b", "float32", 10),
    ],
)
def test_the_limit_is_the_read_of_the_weights(
    engine: str, shape: str, form: str, expected: float
) -> None:
    """494 million weights at 20.3 GB/s."""
    ceiling = Limits(read=20.3e9, float32=302e9, bfloat16=1e9, int8=1194e9, launch=0)
    work, how = Work(1, 128, 128), (engine, form, SHAPES[shape], ceiling)
    first = least(replace(work, new=1), *how)
    assert 127 / (least(work, *how) - first) == pytest.approx(expected, rel=0.05)
