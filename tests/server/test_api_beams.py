"""Beam search over HTTP, from the body to the wire, with a real engine behind it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.server.started import Process
from tests.server.test_api_http import check_error
from tests.server.tiny import make

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = [TEXT, CHAT]
FOUR: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    made = Process(str(make(tmp_path_factory.mktemp("model") / "tiny")))
    made.wait_ready()
    yield made.port
    assert made.end() == 0, "".join(made.lines)


def post(port: int, route: str, **fields: Any) -> tuple[int, bytes]:
    begin: dict[str, Any] = {"prompt": "Once"}
    if route == CHAT:
        begin = {"messages": [{"role": "user", "content": "Once"}]}
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(begin | {"max_tokens": 12} | fields)
    connection.request("POST", route, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


def whole(port: int, route: str, **fields: Any) -> Any:
    status, data = post(port, route, **fields)
    assert status == 200, data
    return json.loads(data)


def blocks(port: int, route: str, **fields: Any) -> list[tuple[str, Any]]:
    """Each event's name and body; the last is [DONE]."""
    status, data = post(port, route, stream=True, **fields)
    assert status == 200, data
    made = []
    for block in data.decode().strip().split("\n\n"):
        *name, line = block.splitlines()
        said = line.removeprefix("data: ")
        made.append(("".join(name)[7:], said if said == "[DONE]" else json.loads(said)))
    assert made[-1] == ("", "[DONE]")
    return made[:-1]


def text_of(choice: Any) -> str:
    text = choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))
    return text if isinstance(text, str) else text.get("content") or ""


def told(body: Any) -> list[Any]:
    return [(text_of(one), one["finish_reason"], one["beam"]) for one in body["choices"]]


@pytest.mark.parametrize("route", ROUTES)
def test_every_dialect_is_the_same_search(port: int, route: str) -> None:
    same = [
        FOUR,
        {"num_beams": 4, "n": 2},
        {"beam_width": 4, "n": 2},
        {"use_beam_search": True, "best_of": 4, "n": 2},
        {"use_beam_search": True, "beam_width": 4, "num_return_sequences": 2, "best_of": 4},
    ]
    bodies = [whole(port, route, **fields) for fields in same]
    assert all(told(body) == told(bodies[0]) for body in bodies)
    named = {"length_penalty": 0.3, "early_stopping": "never", "num_beam_groups": 1}
    assert told(whole(port, route, **FOUR, **named)) != told(bodies[0])


@pytest.mark.parametrize("route", ROUTES)
def test_choices_are_the_best_of_the_beams_in_their_order(port: int, route: str) -> None:
    four = whole(port, route, num_beams=4, n=4, ignore_eos=True, length_penalty=0.5)
    beams = [one["beam"] for one in four["choices"]]
    assert [beam["rank"] for beam in beams] == [one["index"] for one in four["choices"]]
    assert [beam["score"] for beam in beams] == sorted((b["score"] for b in beams), reverse=True)
    for beam in beams:
        assert beam["length"] == 12
        assert beam["score"] == pytest.approx(beam["cumulative_logprob"] / 12**0.5, abs=1e-5)
    two = whole(port, route, num_beams=4, n=2, ignore_eos=True, length_penalty=0.5)
    assert told(two) == told(four)[:2]
    # the first step has one row, and each of the eleven after it has four
    assert two["usage"]["beam_rows_computed"] >= 1 + 11 * 4
    assert two["usage"]["completion_tokens"] == 2 * 12


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_adds_up_to_the_whole(port: int, route: str) -> None:
    expected = whole(port, route, **FOUR)
    parts = blocks(port, route, **FOUR, stream_options={"include_usage": True})
    texts, ends = ["", ""], [[], []]  # type: ignore[var-annotated]
    for _, part in parts[:-1]:
        for choice in part["choices"]:
            texts[choice["index"]] += text_of(choice)
            if choice["finish_reason"] or "beam" in choice:
                ends[choice["index"]].append((choice["finish_reason"], choice["beam"]))
    assert texts == [text_of(one) for one in expected["choices"]]
    assert ends == [[(one["finish_reason"], one["beam"])] for one in expected["choices"]]
    assert parts[-1][1]["choices"] == []
    usage = parts[-1][1]["usage"]
    counted = ("prompt_tokens", "completion_tokens", "total_tokens", "beam_rows_computed")
    assert [usage[name] for name in counted] == [expected["usage"][name] for name in counted]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", ["final", "windowed"])
def test_other_modes_stream_what_they_end_with(port: int, route: str, mode: str) -> None:
    stream = {"mode": mode} | ({"w": 3} if mode == "windowed" else {})
    parts = [part for _, part in blocks(port, route, num_beams=4, beam_stream=stream)]
    last = [part["choices"][0] for part in parts if part["choices"]]
    assert sum("beam" in choice for choice in last) == 1
    text = "".join(map(text_of, last))
    if mode == "final":
        assert text == text_of(whole(port, route, num_beams=4)["choices"][0])
        assert len([choice for choice in last if text_of(choice)]) == 1
    else:
        assert text


@pytest.mark.parametrize("route", ROUTES)
def test_the_tree_grows_beside_the_text(port: int, route: str) -> None:
    tree = {"events": "tree", "max_events_per_s": 1000}
    parts = blocks(port, route, **FOUR, beam_stream=tree, logprobs=1 if route == TEXT else True)
    steps = [part for name, part in parts if name == "beam"]
    plain = [part for name, part in parts if not name]
    assert len(steps) >= 12
    nodes = {node["id"]: node for step in steps for node in step["nodes"]}
    assert all(node["parent"] in nodes or node["parent"] == 0 for node in nodes.values())
    best = max((end for step in steps for end in step["finished"]), key=lambda end: end["score"])
    tokens, at = [], best["node"]
    while at:
        tokens.append(nodes[at]["text"])
        at = nodes[at]["parent"]
    expected = whole(port, route, **FOUR)["choices"][0]
    assert best["score"] == pytest.approx(expected["beam"]["score"], abs=1e-4)
    assert best["length"] == expected["beam"]["length"] == len(tokens)
    first = (choice for part in plain for choice in part["choices"] if not choice["index"])
    assert "".join(map(text_of, first)) == text_of(expected)


def test_log_probabilities_are_those_that_the_score_is_made_of(port: int) -> None:
    body = whole(port, TEXT, **FOUR, logprobs=3, echo=True, return_token_ids=True)
    for choice in body["choices"]:
        said = choice["logprobs"]
        assert choice["text"].startswith("Once")
        prompt = len(said["tokens"]) - choice["beam"]["length"]
        assert said["token_logprobs"][0] is None
        total = sum(said["token_logprobs"][prompt:])
        assert total == pytest.approx(choice["beam"]["cumulative_logprob"], abs=1e-4)
        assert said["text_offset"][prompt] == len("Once")
        assert all(3 <= len(top) <= 4 for top in said["top_logprobs"][prompt:])
    chat = whole(port, CHAT, **FOUR, logprobs=True, top_logprobs=2)
    for choice in chat["choices"]:
        total = sum(token["logprob"] for token in choice["logprobs"]["content"])
        assert total == pytest.approx(choice["beam"]["cumulative_logprob"], abs=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_other_fields_hold_in_a_search(port: int, route: str) -> None:
    text = text_of(whole(port, route, num_beams=4, min_tokens=12)["choices"][0])
    letter = next(one for one in text if "!" <= one <= "~")  # token 0 is the exclamation mark
    stopped = whole(port, route, num_beams=4, n=4, stop=letter)
    assert all(letter not in text_of(one) for one in stopped["choices"])
    banned = whole(port, route, num_beams=4, n=4, logit_bias={str(ord(letter) - 33): -100})
    assert all(letter not in text_of(one) for one in banned["choices"])
    only = whole(port, route, num_beams=4, n=4, allowed_token_ids=[64, 65, 66], max_tokens=3)
    assert all(set(text_of(one)) <= set("abc") for one in only["choices"])
    assert len({text_of(one) for one in only["choices"]}) == 4
    penal = whole(port, route, num_beams=4, repetition_penalty=1.9, presence_penalty=1.5)
    assert told(penal) != told(whole(port, route, num_beams=4))


def test_a_search_is_the_same_beside_others(port: int) -> None:
    asked: list[dict[str, Any]] = [
        {"num_beams": 2 + i % 4, "prompt": "Once" * (i + 1)} for i in range(6)
    ]
    asked += [{"temperature": 1.0, "seed": i, "prompt": "x" * i} for i in range(1, 5)]
    alone = [whole(port, TEXT, **fields)["choices"][0]["text"] for fields in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        bodies = list(pool.map(lambda fields: whole(port, TEXT, **fields), asked))
    assert [body["choices"][0]["text"] for body in bodies] == alone


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_beams": 17}, "num_beams"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 2, "beam_width": 3}, "beam_width"),
        ({"num_beams": 2, "temperature": 1.0, "strict": True}, "temperature"),
        ({"use_beam_search": False, "num_beams": 2}, "use_beam_search"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups"),
        ({"num_beams": 2, "beam_stream": {"mode": "soon"}}, "beam_stream.mode"),
    ],
)
def test_what_no_search_can_do_is_refused(
    port: int, route: str, fields: dict[str, Any], param: str
) -> None:
    status, data = post(port, route, **fields)
    error = json.loads(data)
    check_error(error)
    assert (status, error["error"]["param"]) == (400, param)
