"""The whole server as a process, with a real engine and a tiny model: start, serve, stop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from benchmarks.soak.starts import SETTINGS
from server.serve import _fingerprint
from tests.server.started import Process, alive, cmdline, free_port, run, until
from tests.server.tiny import make

KEY = "sk-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Process]:
    keys = folder.parent / "keys"
    keys.write_text(KEY)
    made = Process(str(folder), "--api-keys", str(keys))
    made.wait_ready()
    yield made
    children = made.children
    assert made.end() == 0, "".join(made.lines)
    assert not any(map(alive, children))


@pytest.fixture(scope="module")
def client(running: Process) -> Iterator[Any]:
    url = f"http://127.0.0.1:{running.port}/v1"
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def test_it_says_what_runs(running: Process) -> None:
    """One line: model, device, kernels and why, KV tokens, URL."""
    until(lambda: any("serves" in line for line in running.lines))
    told = next(json.loads(line)["msg"] for line in running.lines if "serves" in line)
    for word in ("tiny", "cpu", "float32", "32768 tokens", f"127.0.0.1:{running.port}"):
        assert word in told


def test_a_fingerprint_names_the_numbers_that_answers_are_computed_in() -> None:
    """Two servers whose answers may differ do not say that they are the same."""
    kinds = [("float32", "float32", "float32"), ("float32", "int4", "float32")]
    kinds += [("float32", "bfloat16", "bfloat16"), ("float32", "int4", "bfloat16")]
    names = ("dtype", "weights", "kv_dtype")
    prints = {_fingerprint(dict(zip(names, kind, strict=True))) for kind in kinds}
    assert len(prints) == len(kinds)


def test_every_line_of_the_log_is_an_object(running: Process) -> None:
    """T57: whatever is in the path, the id and the model's name."""
    for path in ("/%0d%0a%22evil%22", b"/\x1b[31m".hex(), "/%1b%5b31m"):
        running.get(path)
    evil = 'a\r\n"}\x1b[31m\u2028{"level": "evil"'
    for model, prompt in ((evil, "x"), ("tiny", evil)):
        assert post(running, {"model": model, "prompt": prompt}, {"x-request-id": '"}{'})
    running.get("/version")
    until(lambda: any("/version" in line for line in running.lines))
    assert not any("evil" in json.loads(line)["level"] for line in running.lines)
    for line in running.lines:
        told = json.loads(line)
        assert {"ts", "level", "msg"} <= set(told)
    told = json.loads(running.lines[-1])
    assert {"request_id", "client", "status", "duration_ms", "path"} <= set(told)


def test_greedy_streams_equal_the_whole(client: Any) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 64, "temperature": 0}
    whole = client.completions.create(**ask)
    parts = list(client.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.usage.completion_tokens == 64 or whole.choices[0].finish_reason == "stop"


def test_beams_stream(client: Any) -> None:
    beams: dict[str, Any] = {"num_beams": 3, "n": 2}
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 24, "extra_body": beams}
    whole = client.completions.create(**ask)
    scores = [choice.beam["score"] for choice in whole.choices]
    assert scores == sorted(scores, reverse=True)
    assert whole.usage.beam_rows_computed > 24
    text = ["", ""]
    for part in client.completions.create(**ask, stream=True):
        text[part.choices[0].index] += part.choices[0].text
    assert text == [choice.text for choice in whole.choices]
    beams["beam_stream"] = {"events": "tree", "max_events_per_s": 1000}
    tree = [part for part in client.completions.create(**ask, stream=True) if not part.id]
    assert tree


def test_logprobs_echo_and_prompt(client: Any) -> None:
    """lm-eval's request: a batch of token ids, one token, the prompt's log-probabilities."""
    prompts = [[72, 101, 108], [104, 101, 106, 44, 32]]
    got = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for choice, prompt in zip(got.choices, prompts, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(prompt) + 1
        assert told.token_logprobs[0] is None
        assert all(
            value <= max(top.values())
            for value, top in list(zip(told.token_logprobs, told.top_logprobs, strict=True))[1:]
        )
        assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
    none = client.completions.create(model="tiny", prompt="Hi", max_tokens=0, echo=True, logprobs=0)
    assert none.choices[0].text == "Hi"
    assert len(none.choices[0].logprobs.tokens) == 2


def test_sampled_choices_are_the_seeds(client: Any) -> None:
    def texts(seed: int) -> list[str]:
        got = client.completions.create(
            model="tiny", prompt="Once", max_tokens=16, n=3, seed=seed, stop=["\n"]
        )
        return [choice.text for choice in got.choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) > 1


def test_chats_and_embeddings(client: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    got = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=30, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = got.choices[0].logprobs.content
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    assert joined == got.choices[0].message.content
    vectors = client.embeddings.create(model="tiny", input=["a b", "a b", "c"])
    assert vectors.data[0].embedding == vectors.data[1].embedding != vectors.data[2].embedding


def test_equal_streams_at_once(client: Any) -> None:
    def text(_: int) -> str:
        stream = client.completions.create(
            model="tiny", prompt="Once", max_tokens=20, temperature=0, stream=True
        )
        return "".join(part.choices[0].text for part in stream)

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(text, range(32)))) == 1


def test_only_the_port_listens(running: Process) -> None:
    """T42: of all processes of the server."""
    pids = [running.process.pid]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
    sockets = {
        os.readlink(link)
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink() and os.path.lexists(link)
    }
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.add(fields[1])
    assert listening == {f"0100007F:{running.port:04X}"}


def post(running: Process, body: dict[str, Any], headers: dict[str, str] | None = None) -> int:
    """The status of a completion."""
    connection = HTTPConnection("127.0.0.1", running.port, timeout=60)
    said = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", json.dumps(body), said | (headers or {}))
    status = connection.getresponse().status
    connection.close()
    return status


def test_health_answers_while_a_long_text_is_read(running: Process) -> None:
    """T16: nearly 4 MiB of words, which a real tokenizer cuts."""
    for word in ("word ", "a", "\u00e9\U0001f331 "):
        text = word * (3_900_000 // len(json.dumps(word).encode()))
        with ThreadPoolExecutor(1) as pool:
            asked, slowest = pool.submit(post, running, {"prompt": text}), 0.0
            while not asked.done():
                began = time.monotonic()
                assert running.get("/health/live") == 200
                slowest = max(slowest, time.monotonic() - began)
            assert asked.result() == 400
        assert slowest < 1, word[:1]


def test_the_key_is_nowhere(running: Process) -> None:
    """T52: not among arguments or variables of any process, in no line of the log, no metric."""
    assert post(running, {"prompt": "x", "max_tokens": 1}) == 200
    assert post(running, {"prompt": "x"}, {"authorization": f"Bearer {KEY}x"}) == 401
    assert post(running, {"prompt": KEY, "model": "none"}) == 404
    for pid in [running.process.pid, *running.children]:
        for name in ("cmdline", "environ"):
            assert KEY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    until(lambda: any('"status": 401' in line for line in running.lines))
    assert not any(KEY in line for line in running.lines)
    connection = HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request("GET", "/metrics", headers={"authorization": f"Bearer {KEY}"})
    page = connection.getresponse().read()
    connection.close()
    assert b"vllm:" in page
    assert KEY.encode() not in page


# Starting and stopping


def test_a_taken_port_is_said_before_anything_is_loaded(running: Process) -> None:
    """T78"""
    got = run("serve", "/nowhere/model", "--port", str(running.port))
    assert got.returncode == 1
    assert got.stderr.startswith(f"kvist: 127.0.0.1:{running.port} cannot be listened on: it is")
    assert len(got.stderr.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "says"), SETTINGS, ids=lambda one: str(one)[:30])
def test_bad_starts_are_one_line(arguments: list[str], says: str) -> None:
    """G12"""
    got = run("serve", "--port", str(free_port()), *arguments)
    assert got.returncode in (1, 2)
    assert re.search(says, got.stderr.splitlines()[-1])
    assert "Traceback" not in got.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    """T44, the part of the start: an exit status and one line."""
    make(tmp_path)
    (tmp_path / name).write_text("{")
    made = Process(str(tmp_path))
    assert made.wait() == 1
    assert len(made.lines) == 1
    assert name in made.lines[0]
    assert made.lines[0].startswith("kvist: ")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, server.cli as c; c._parser(); print(*sorted(sys.modules))"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(got.stdout.split())
    assert not loaded & {"torch", "fastapi", "pydantic", "uvicorn", "transformers", "numpy"}


def test_the_front_needs_no_torch() -> None:
    code = "import sys, server.serve; print(*sorted(sys.modules))"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in got.stdout.split()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_during_loading_ends_it_at_once(folder: Path, number: int) -> None:
    """T66"""
    made = Process(str(folder))
    until(lambda: made.get("/health/live") == 200)
    children = made.children
    assert made.end(number) == 0
    assert not any(map(alive, children))
    assert not [line for line in made.lines if "Traceback" in line]


@pytest.mark.slow
def test_the_engine_comes_back(running: Process, client: Any) -> None:
    """T60, seen from outside: a stream that runs gets an error event, and then all is as before."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0}
    before = client.completions.create(**ask, max_tokens=10).choices[0].text
    stream = client.completions.create(**ask, max_tokens=1900, stream=True)
    next(stream)
    engine = next(pid for pid in running.children if b"worker" in cmdline(pid))
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(Exception, match="engine"):
        for _ in stream:
            pass
    until(lambda: running.get("/health/ready") == 200, 60)
    assert client.completions.create(**ask, max_tokens=10).choices[0].text == before
