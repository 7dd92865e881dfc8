"""Beams through the whole engine, on a real network in pages, against transformers."""

import random
from itertools import product
from typing import Any

import pytest
import torch

from model.cache import Cache
from model.decoder import Decoder
from model.runner import Runner
from model.sampling import Sampling
from model.weights import load
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Beams, Request
from tests.server.beam_oracle import VOCABULARY, Answer, compare, generate, gpt2, llama

Pair = tuple[Any, Decoder]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Two networks of each family, theirs and ours."""
    made = []
    for kind, seed in product((gpt2, llama), range(2)):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs = kind(seed, bias=False)
        theirs.save_pretrained(folder)
        made.append((theirs, load(folder, dtype=torch.float32)))
    return made


def engine_of(decoder: Decoder, pages: int, size: int, caching: bool) -> Engine:
    runner = Runner(decoder, Cache(decoder.config, pages, size), seats=64)
    options = Options(seats=64, budget=256, vocabulary=VOCABULARY, queue_tokens=99_999)
    return Engine(runner, Pages(pages, size, caching=caching), options)


def random_search(rng: random.Random, theirs: Any, id: str) -> tuple[Request, list[Answer]]:
    """A request, and what transformers answers to it."""
    width, limit = rng.randint(2, 6), rng.randint(1, 12)
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
    options: dict[str, Any] = {
        "num_beams": width,
        "max_new_tokens": limit,
        "num_return_sequences": rng.randint(1, width),
        "length_penalty": rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": rng.choice([False, True, "never"]),
    }
    least = rng.choice([0, 0, 0, min(2, limit)])
    if rng.random() < 0.7:  # ends that the model likes to say
        said = {t for a in generate(theirs, prompt, **options).answers for t in a.tokens}
        options["eos_token_id"] = rng.sample(sorted(said), min(len(said), rng.randint(1, 3)))
    if least:
        options["min_new_tokens"] = least
    if rng.random() < 0.3:
        options["repetition_penalty"] = 1.4
    answers = generate(theirs, prompt, **options).answers
    return _request(id, prompt, options, exact_exit=rng.random() < 0.5), answers


def _request(id: str, prompt: list[int], options: dict[str, Any], exact_exit: bool) -> Request:
    """The same in our words."""
    return Request(
        id=id,
        prompt=prompt,
        max_tokens=options["max_new_tokens"],
        n=options["num_return_sequences"],
        sampling=Sampling(
            stops=tuple(options.get("eos_token_id", ())),
            min_tokens=options.get("min_new_tokens", 0),
            repetition_penalty=options.get("repetition_penalty", 1.0),
        ),
        beams=Beams(
            width=options["num_beams"],
            length_penalty=options["length_penalty"],
            early_stopping=options["early_stopping"],
            exact_exit=exact_exit,
        ),
        logprobs=0,
    )


def finish(engine: Engine) -> dict[str, list[Answer]]:
    """Fold the events of everyone, and see that what was told adds up."""
    told: dict[str, dict[int, Answer]] = {}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None, event.error
            for choice in event.choices:
                before = told.setdefault(event.id, {}).get(choice.index, Answer([], 0.0))
                score = before.score if choice.score is None else choice.score
                told[event.id][choice.index] = Answer(before.tokens + choice.tokens, score)
        engine.scheduler.check()
    return {id: [found[i] for i in sorted(found)] for id, found in told.items()}


def compare_mixed_batches(pairs: list[Pair], rounds: int, seed: int) -> int:
    """Groups of any width beside one another and beside others, in pages of any size, with and
    without a prefix cache, with and without enough pages; how many groups gave way."""
    rng, preemptions = random.Random(seed), 0
    for _ in range(rounds):
        theirs, decoder = rng.choice(pairs)
        size, tight = rng.choice([1, 4, 16]), rng.random() < 0.5
        pages = -(-90 // size) + 12 if tight else 2000
        engine = engine_of(decoder, pages, size, caching=rng.random() < 0.5)
        searches = [random_search(rng, theirs, f"beams-{i}") for i in range(rng.randint(1, 5))]
        for request, _ in searches:
            engine.submit(request)
            for j in range(rng.randint(0, 6)):
                prompt = request.prompt if rng.random() < 0.5 else [5, *request.prompt]
                engine.submit(Request(id=f"{request.id}-{j}", prompt=prompt, max_tokens=9))
        found = finish(engine)
        for request, answers in searches:
            compare(found[request.id], answers, request)
        preemptions += engine.stats.preemptions
    return preemptions


def test_beams_in_a_mixed_batch_are_transformers(pairs: list[Pair]) -> None:
    assert compare_mixed_batches(pairs, 20, seed=1), "nobody ever gave way"


@pytest.mark.slow
def test_many_beams_in_mixed_batches_are_transformers(pairs: list[Pair]) -> None:
    assert compare_mixed_batches(pairs, 150, seed=2)
