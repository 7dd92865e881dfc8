"""The whole engine over a real network: any mix of requests gives what each of them gets alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.cache import Cache
from model.decoder import Decoder
from model.runner import Runner
from model.sampling import Sampling
from model.weights import load
from server import Engine as OfflineEngine
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.fold import join
from server.engine.pages import Pages
from server.engine.request import Beams, Choice, Event, Request
from server.errors import SettingError, TooLong
from tests.server.tiny import VOCABULARY, make

GREEDY = Sampling(temperature=0.0)
EOS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load(folder, dtype=torch.float32)


def engine_of(
    decoder: Decoder, pages: int = 512, size: int = 16, caching: bool = True, **options: Any
) -> Engine:
    options = {"seats": 32, "vocabulary": VOCABULARY, "queue_tokens": 1 << 20, **options}
    runner = Runner(decoder, Cache(decoder.config, pages, size), seats=options["seats"])
    return Engine(runner, Pages(pages, size, caching=caching), Options(**options))


def run(engine: Engine, requests: list[Request], every: int = 1) -> dict[str, Event]:
    """Submit one every so many steps; what each was told in the end."""
    said: dict[str, Event] = {}
    left, steps = list(requests), 0
    while left or not engine.idle:
        if left and steps % every == 0:
            engine.submit(left.pop(0))
        steps += 1
        for event in engine.step():
            said[event.id] = join(said[event.id], event) if event.id in said else event
        engine.scheduler.check()
    return said


def mixed() -> list[Request]:
    """Prompts that share beginnings, under all sorts of sampling."""
    trunk = [i * 37 % 250 for i in range(60)]
    requests = []
    for i in range(14):
        sampling = Sampling(
            temperature=i % 3 * 0.5,
            top_k=(0, 5, 0, 40)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            min_p=(0.0, 0.0, 0.02)[i % 3],
            repetition_penalty=(1.0, 1.0, 1.0, 1.3)[i % 4],
            presence_penalty=(0.0, 0.0, 0.0, 0.0, 0.5)[i % 5],
            logit_bias={7: 2.0} if i % 6 == 5 else {},
            min_tokens=(0, 4)[i % 2],
            stops=(EOS, 11, 13) if i % 2 else (),
            seed=i // 2,
        )
        beams = Beams(width=3) if i % 7 == 6 else None
        requests.append(
            Request(
                id=str(i),
                prompt=[*trunk[: 1 + i * 29 % 40], i],
                max_tokens=6 + i * 5 % 17,
                sampling=GREEDY if beams else sampling,
                n=1 if beams else 1 + (i % 5 == 4),
                beams=beams,
                logprobs=(None, 2)[i % 2],
                prompt_logprobs=(None, None, 1)[i % 3],
            )
        )
    return requests


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[str, Event]:
    """Each in an engine of its own, in one piece."""
    said: dict[str, Event] = {}
    for request in mixed():
        said |= run(engine_of(decoder, budget=8192, chunk=0, caching=False), [request])
    return said


CASES: list[dict[str, Any]] = [
    {},
    {"chunk": 1, "budget": 24},
    {"chunk": 7, "budget": 24, "caching": False},
    {"chunk": 64, "budget": 80},
    {"chunk": 1024, "budget": 2048, "draft": 4},
    {"chunk": 7, "budget": 40, "draft": 4, "ahead": 1},
    {"pages": 22, "size": 4},
    {"pages": 22, "size": 4, "caching": False, "chunk": 7, "budget": 24},
    {"pages": 22, "size": 4, "draft": 4, "chunk": 1, "budget": 24},
    {"pages": 88, "size": 1, "ahead": 1},
    {"seats": 3, "budget": 5, "ahead": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_mix_gives_what_each_gets_alone(
    decoder: Decoder, alone: dict[str, Event], case: dict[str, Any]
) -> None:
    engine = engine_of(decoder, **case)
    said = run(engine, mixed())
    for id, expected in alone.items():
        event = said[id]
        assert event.error is None
        told = sorted(event.choices, key=lambda choice: choice.index)
        for choice, other in zip(told, expected.choices, strict=True):
            assert choice.tokens == other.tokens
            assert (choice.finish, choice.stop) == (other.finish, other.stop)
            assert choice.logprobs == pytest.approx(other.logprobs, abs=1e-3)
            assert [[t for t, _ in top] for top in choice.top] == [
                [t for t, _ in top] for top in other.top
            ]
        _same_scores(event, expected)
    assert engine.scheduler.pages.live == 0
    if "pages" in case:
        assert engine.stats.preemptions > 0


def _same_scores(event: Event, expected: Event) -> None:
    for one, other in zip(event.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one[:2] == pytest.approx(other[:2], abs=1e-3)


def test_deterministic_log_probabilities_are_the_same_bit_for_bit(folder: Path) -> None:
    """Whoever else is in the batch, however prompts are cut, and when pages are taken away."""
    cases: list[dict[str, Any]] = [
        {"step_tokens": 8192, "prefix_cache": False},
        {"step_tokens": 24},
        {"step_tokens": 40, "pages": 22, "page_size": 4},
    ]
    said: list[dict[str, Any]] = []
    preemptions = []
    for case in cases:
        how: dict[str, Any] = {"device": "cpu", "deterministic": True, "pages": 512, **case}
        try:
            engine = OfflineEngine(str(folder), rows=32, **how)
        except SettingError as error:
            pytest.skip(f"no native kernels here: {error}")
        events = run(engine, mixed(), every=1 + len(said))
        said.append({id: _numbers(event) for id, event in events.items()})
        preemptions.append(engine.stats.preemptions)
    assert said[0] == said[1] == said[2]
    assert preemptions[2] > 0


def _numbers(event: Event) -> Any:
    told = sorted(event.choices, key=lambda choice: choice.index)
    return event.prompt_logprobs, [(one.tokens, one.logprobs, one.top) for one in told]


def test_greedy_text_and_its_logprobs_are_transformers(folder: Path, decoder: Decoder) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[i * 31 % 250 for i in range(length)] for length in (1, 5, 17, 40)]
    requests = [
        Request(id=str(i), prompt=p, max_tokens=20, sampling=GREEDY, logprobs=3, prompt_logprobs=0)
        for i, p in enumerate(prompts)
    ]
    said = run(engine_of(decoder, size=4, budget=16, chunk=5), requests)
    for i, prompt in enumerate(prompts):
        (choice,) = said[str(i)].choices
        with torch.inference_mode():
            whole = torch.tensor([prompt + choice.tokens])
            chances = theirs(whole).logits[0].log_softmax(-1)
        after = chances[len(prompt) - 1 : -1]
        assert choice.tokens == after.argmax(-1).tolist()
        best = after.topk(3)
        assert choice.logprobs == pytest.approx(best.values[:, 0].tolist(), abs=1e-4)
        assert [[token for token, _ in top] for top in choice.top] == best.indices.tolist()
        assert choice.ranks == [1] * 20
        scores = [score[0] for score in said[str(i)].prompt_logprobs[1:] if score is not None]
        expected = chances[range(len(prompt) - 1), prompt[1:]].tolist()
        assert scores == pytest.approx(expected, abs=1e-4)


# ── the offline engine ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def offline(folder: Path) -> OfflineEngine:
    return OfflineEngine(
        str(folder), device="cpu", dtype="float32", pages=64, threads=1, queue_requests=3, rows=4
    )


def test_many_prompts_at_once_in_their_order(offline: OfflineEngine) -> None:
    prompts: list[str | list[int]] = ["one", "two and more", [3, 4, 5], "four", "fünf", "6", "7"]
    together = offline.generate(prompts, max_tokens=9, sampling=GREEDY)
    single = [offline.generate([prompt], max_tokens=9, sampling=GREEDY)[0] for prompt in prompts]
    assert [_only(event).tokens for event in together] == [_only(event).tokens for event in single]
    decode = offline.parts.tokenizer.decode
    assert all(_only(event).text == decode(_only(event).tokens) for event in together)
    assert all(event.done and event.error is None for event in together)


def _only(event: Event) -> Choice:
    (choice,) = event.choices
    return choice


def test_choices_come_in_order_and_beams_too(offline: OfflineEngine) -> None:
    (event,) = offline.generate(["abc"], n=3, max_tokens=5, sampling=Sampling(seed=1))
    assert [choice.index for choice in event.choices] == [0, 1, 2]
    (event,) = offline.generate(["abc"], n=2, max_tokens=5, beams=Beams(width=4))
    scores = [choice.score or 0.0 for choice in event.choices]
    assert scores == sorted(scores, reverse=True)


def test_a_prompt_that_can_never_fit_stops_all_before_they_begin(offline: OfflineEngine) -> None:
    steps = offline.stats.steps
    with pytest.raises(TooLong, match="maximum context length is 2048"):
        offline.generate(["fine", "x" * 3000])
    assert offline.stats.steps == steps


def test_an_end_ends_it_unless_told_otherwise(offline: OfflineEngine) -> None:
    bias = Sampling(temperature=0.0, logit_bias={EOS: 100.0})
    (ended,) = offline.generate(["abc"], max_tokens=4, sampling=bias)
    assert (_only(ended).tokens, _only(ended).text, _only(ended).finish) == ([EOS], "", "stop")
    (on,) = offline.generate(["abc"], max_tokens=4, sampling=bias, ignore_eos=True)
    assert (_only(on).tokens, _only(on).finish) == ([EOS] * 4, "length")


def test_nothing_asked_is_answered_too(offline: OfflineEngine) -> None:
    (event,) = offline.generate(["abc"], max_tokens=0)
    assert (event.done, _only(event).tokens) == (True, [])
    assert offline.generate([]) == []


def test_a_question_between_steps(offline: OfflineEngine) -> None:
    vector = offline.answers["embed"](prompt=[1, 2, 3], pooling="last")
    assert len(vector) == offline.parts.ready.config.hidden


def test_torch_is_not_loaded_before_it_is_needed() -> None:
    code = "import server, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = __import__("server").Motor
