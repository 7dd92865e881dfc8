"""Masks that move with every token: bad words, and random automata, against transformers."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import count, product
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch, Ints, Output
from model.cache import Cache
from model.decoder import Decoder
from model.runner import Runner
from model.sampling import Sampling, packed
from model.weights import load
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.masks import BadWords, Mask, boundless, follow
from server.engine.pages import Pages
from server.engine.request import Beams, Event, Request
from tests.server.beam_oracle import VOCABULARY, Answer, generate, gpt2, llama
from tests.server.test_engine import run

Pair = tuple[Any, Decoder]
NEVER = -1e5  # transformers fills up with what is no beam, at −1e9 over a power of the length


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


class Automaton:
    """A test's own mask: in each state another random set is allowed, if narrow a single token."""

    def __init__(self, seed: int, states: int = 7, narrow: bool = True) -> None:
        rng = np.random.default_rng(seed)
        shares = rng.choice([0.0, 0.0, 0.03, 0.3], (states, 1)) if narrow else 0.4
        self.truths = rng.random((states, VOCABULARY)) < shares
        self.truths[np.arange(states), rng.integers(0, VOCABULARY, states)] = True
        self.after = rng.integers(0, states, (states, VOCABULARY)).tolist()
        self.free = int(rng.integers(2)) - 1  # a state in which all is allowed; −1: none
        self.state = 0

    def allowed(self) -> Ints | None:
        return None if self.state == self.free else packed(self.truths[self.state])

    def push(self, token: int) -> None:
        assert self.state == self.free or self.truths[self.state, token], "it was forbidden"
        self.state = self.after[self.state][token]

    def fork(self) -> "Automaton":
        other = object.__new__(Automaton)
        other.__dict__ = dict(self.__dict__)
        return other

    def walk(self, tokens: list[int]) -> list[int]:
        """What may follow, for transformers: also after what may not be."""
        state = self.state
        for token in tokens:
            state = self.after[state][token]
        free = state == self.free
        return list(range(VOCABULARY)) if free else np.flatnonzero(self.truths[state]).tolist()


def engine_of(
    decoder: Decoder,
    mask: Callable[[Request], Mask | None] = boundless,
    pages: int = 2000,
    size: int = 4,
    **options: Any,
) -> Engine:
    runner = Runner(decoder, Cache(decoder.config, pages, size), seats=64)
    options = {"seats": 64, "budget": 256, "vocabulary": VOCABULARY} | options
    return Engine(runner, Pages(pages, size), Options(queue_tokens=99_999, **options), mask=mask)


def random_options(rng: random.Random, width: int) -> dict[str, Any]:
    """transformers' names; one beam is greedy."""
    options: dict[str, Any] = {"max_new_tokens": rng.randint(3, 14), "num_beams": width}
    if rng.random() < 0.6:
        options["eos_token_id"] = rng.sample(range(VOCABULARY), 2)
    if width > 1:
        options["num_return_sequences"] = rng.randint(1, width)
        options["length_penalty"] = rng.choice([-1.0, 0.0, 1.0, 2.0])
        options["early_stopping"] = rng.choice([False, True, "never"])
    return options


def request_of(id: str, prompt: list[int], options: dict[str, Any], **sampling: Any) -> Request:
    """The same in our words."""
    width = options["num_beams"]
    beams = Beams(
        width=width,
        length_penalty=options.get("length_penalty", 1.0),
        early_stopping=options.get("early_stopping", False),
    )
    stops = tuple(options.get("eos_token_id", ()))
    return Request(
        id=id,
        prompt=prompt,
        max_tokens=options["max_new_tokens"],
        n=options.get("num_return_sequences", 1),
        beams=beams if width > 1 else None,
        sampling=Sampling(temperature=0, stops=stops, **sampling),
    )


@torch.inference_mode()
def expected(theirs: Any, prompt: list[int], options: dict[str, Any]) -> list[Answer]:
    """transformers' answers, without those that stand for no answer."""
    if options["num_beams"] > 1:
        found = generate(theirs, prompt, **options).answers
        return [answer for answer in found if answer.score > NEVER]
    whole = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return [Answer(whole[0, len(prompt) :].tolist(), 0.0)]


def compare(found: Event, answers: list[Answer], request: Request) -> bool:
    """Whether they are equal. With early_stopping they need not be: beams that are none, at −1e9,
    fill transformers' pool and end its search. Ours goes on, and can only find better answers."""
    assert found.error is None, (found.error, request)
    ours = [Answer(choice.tokens, choice.score or 0.0) for choice in found.choices]
    sooner = request.beams is not None and request.beams.early_stopping is True
    if sooner and [a.tokens for a in ours] != [a.tokens for a in answers]:
        pairs = zip(ours, answers)
        assert len(ours) >= len(answers), request
        assert all(one.score >= other.score - 1e-4 for one, other in pairs), request
        return False
    assert [a.tokens for a in ours] == [a.tokens for a in answers], request
    scores = [a.score for a in ours], [a.score for a in answers]
    np.testing.assert_allclose(*scores, rtol=1e-6, atol=1e-4, err_msg=str(request))
    return True


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]


def words_in_the_way(
    rng: random.Random, prompt: list[int], answers: list[Answer]
) -> list[list[int]]:
    """Sequences that would have been said, some of them begun by the prompt; and others."""
    words = {(rng.randrange(VOCABULARY),), tuple(rng.choices(range(VOCABULARY), k=3))}
    for answer in answers:
        said = prompt[-2:] + answer.tokens
        for _ in range(3):
            at, length = rng.randrange(len(said)), rng.randint(2, 4)
            words.add(tuple(said[at : at + length]))
    return [list(word) for word in sorted(words)]


def compare_bad_words(pairs: list[Pair], cases: int, seed: int) -> Counter[bool]:
    """Many at a time in one batch; how often the words were in the way, or not."""
    rng, changed = random.Random(seed), Counter[bool]()
    for first in range(0, cases, 12):
        theirs, decoder = rng.choice(pairs)
        wanted: dict[str, tuple[Request, list[Answer]]] = {}
        for i in range(first, first + 12):
            prompt, options = (
                random_prompt(rng),
                random_options(rng, rng.choice([1, 1, 2, 3, 4, 5])),
            )
            without = expected(theirs, prompt, options)
            words = words_in_the_way(rng, prompt, without)
            answers = expected(theirs, prompt, options | {"bad_words_ids": words})
            # An end token alone is no bad word in transformers.
            ends = [[end] for end in options.get("eos_token_id", ())]
            bad = tuple(tuple(word) for word in words if word not in ends)
            wanted[str(i)] = request_of(str(i), prompt, options, bad_words=bad), answers
            changed[[a.tokens for a in answers] != [a.tokens for a in without]] += 1
        found = run(engine_of(decoder), [request for request, _ in wanted.values()])
        for id, (request, answers) in wanted.items():
            assert compare(found[id], answers, request), request
    return changed


def test_bad_words_are_transformers(pairs: list[Pair]) -> None:
    changed = compare_bad_words(pairs, 96, seed=1)
    assert changed[True] > changed[False]


@pytest.mark.slow
def test_many_bad_words_are_transformers(pairs: list[Pair]) -> None:
    compare_bad_words(pairs, 500, seed=2)


def compare_automata(pairs: list[Pair], cases: int, seed: int) -> tuple[int, int]:
    """Greedy and beams; how many answers were fewer than asked for, and how many searches went on
    where transformers' stopped."""
    rng, fewer, longer = random.Random(seed), 0, 0
    for first in range(0, cases, 8):
        theirs, decoder = rng.choice(pairs)
        wanted: dict[str, tuple[Request, list[Answer]]] = {}
        for i in range(first, first + 8):
            prompt, options = random_prompt(rng), random_options(rng, rng.choice([1, 2, 3, 4, 5]))
            walk, length = Automaton(i).walk, len(prompt)

            def allowed(_: int, ids: Any, walk: Any = walk, length: int = length) -> list[int]:
                found: list[int] = walk(ids[length:].tolist())
                return found

            answers = expected(theirs, prompt, options | {"prefix_allowed_tokens_fn": allowed})
            request = request_of(str(i), prompt, options)
            wanted[str(i)] = request, answers
            fewer += request.n - len(answers)
        engine = engine_of(decoder, lambda request: Automaton(int(request.id)))
        found = run(engine, [request for request, _ in wanted.values()])
        for id, (request, answers) in wanted.items():
            longer += not compare(found[id], answers, request)
    return fewer, longer


def test_automata_are_transformers(pairs: list[Pair]) -> None:
    fewer, longer = compare_automata(pairs, 96, seed=3)
    assert fewer, "no mask ever left fewer beams than wanted"
    assert not longer


@pytest.mark.slow
def test_many_automata_are_transformers(pairs: list[Pair]) -> None:
    assert compare_automata(pairs, 600, seed=4)[1] <= 3


SEARCHES = [
    Beams(width=3),
    Beams(width=4, sample=True),
    Beams(width=6, groups=3, diversity_penalty=0.5),
    Beams(width=3, mode="windowed", window=2),
]


def many() -> list[Request]:
    """Under automata, bad words and neither: greedy, drawn, several branches, sorts of beams."""
    rng, requests = random.Random(5), []
    trunk = random_prompt(rng) * 3
    for i in range(16):
        beams = SEARCHES[i // 4] if i % 4 == 3 else None
        sampling = Sampling(
            temperature=i % 3 * 0.7,
            bad_words=((i, 1), (2, 3, i), (i + 20,)) if i % 3 else (),
            allowed=tuple(range(5, 48)) if i % 5 == 4 else (),
            repetition_penalty=1.2 if i % 6 == 5 else 1.0,
            stops=(9,) if i % 2 else (),
            seed=i,
        )
        requests.append(
            Request(
                id=str(i),
                prompt=[*trunk[: 1 + i * 7 % 20], i],
                max_tokens=4 + i * 5 % 23,
                sampling=sampling,
                n=1 + i % 3,
                beams=beams,
                logprobs=1,
            )
        )
    return requests


def automaton(request: Request) -> Mask | None:
    """Every second request has one that leaves a choice in each state."""
    return Automaton(int(request.id), narrow=False) if int(request.id) % 2 else None


@pytest.fixture(scope="module")
def alone(pairs: list[Pair]) -> dict[str, Event]:
    said: dict[str, Event] = {}
    for request in many():
        said |= run(engine_of(pairs[-1][1], automaton), [request])
    return said


CASES: list[dict[str, Any]] = [
    {},
    {"ahead": 1},
    {"draft": 5},
    {"draft": 5, "ahead": 1, "budget": 70},
    {"pages": 70, "size": 2},
    {"pages": 70, "size": 2, "ahead": 1, "draft": 3},
    {"budget": 64, "chunk": 3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_requests_get_together_what_each_gets_alone(
    case: dict[str, Any], pairs: list[Pair], alone: dict[str, Event]
) -> None:
    engine = engine_of(pairs[-1][1], automaton, **case)
    said = run(engine, many())
    for id, event in alone.items():
        assert said[id].error is None
        for ours, theirs in zip(said[id].choices, event.choices, strict=True):
            assert (ours.tokens, ours.finish, ours.stop) == (
                theirs.tokens, theirs.finish, theirs.stop,
            )  # fmt: skip
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    assert (engine.stats.preemptions > 0) == ("pages" in case)
    assert (engine.stats.drafted > 0) == ("draft" in case)


def test_what_is_said_is_allowed(alone: dict[str, Event]) -> None:
    """By the automaton and the words at once."""
    for request in many():
        for choice in alone[request.id].choices:
            mask = automaton(request)
            said = choice.tokens
            for at, token in enumerate(said):
                if mask is not None:
                    words = mask.allowed()
                    assert words is None or words[token >> 5] >> (token & 31) & 1
                    mask.push(token)
                whole = request.prompt + said[: at + 1]
                for word in request.sampling.bad_words:
                    assert tuple(whole[-len(word) :]) != word


def test_a_guess_is_followed_until_it_cannot_come_true() -> None:
    mask = BadWords([(1, 2), (5, 6)], 40)
    mask.push(1)
    assert [words is None for words in follow(mask, [3, 5, 7], ())] == [False, True, False, True]
    assert len(follow(mask, [3, 5, 6, 7], ())) == 3
    assert len(follow(mask, [2, 3], ())) == 1
    assert len(follow(mask, [3, 9, 4], {9})) == 2
    (words,) = follow(mask, [], ())
    assert words is not None
    assert np.array_equal(words, packed(np.arange(40) != 2))
    mask.push(1)  # what follows a guess is asked of a fork
    assert mask.allowed() is not None


def test_neither_masks_nor_beams_are_launched_ahead(pairs: list[Pair]) -> None:
    """They need the token that the step in flight draws, on the host."""
    launched: list[int] = []
    for mask, beams in ((automaton, None), (boundless, Beams(width=2)), (boundless, None)):
        engine = engine_of(pairs[0][1], mask, ahead=1)
        engine.submit(Request(id="1", prompt=[1, 2], max_tokens=9, beams=beams))
        engine.step()
        launched.append(engine.stats.steps)
    assert launched == [1, 1, 2]


def test_a_step_that_fails_leaves_masks_where_they_were(
    pairs: list[Pair], alone: dict[str, Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, launches = engine_of(pairs[-1][1], automaton, draft=3), count()
    launch = Runner.launch

    def failing(runner: Runner, batch: Batch) -> Callable[[], Output]:
        if next(launches) == 6:
            raise RuntimeError("a test says so")
        return launch(runner, batch)

    monkeypatch.setattr(Runner, "launch", failing)
    said = run(engine, many())
    assert engine.stats.retries == 1
    for id, event in alone.items():
        assert [c.tokens for c in said[id].choices] == [c.tokens for c in event.choices]


@pytest.mark.parametrize("words", [((3, 99_999), (99_999, 3)), ((3, 99_999),), ((99_999,),)])
def test_words_that_cannot_be_said_ban_nothing(
    pairs: list[Pair], words: tuple[tuple[int, ...], ...]
) -> None:
    sampling = Sampling(temperature=0, bad_words=words)
    engine = engine_of(pairs[0][1])
    request = Request(id="1", prompt=[1, 3], max_tokens=5, sampling=sampling)
    free = Request(id="2", prompt=[1, 3], max_tokens=5, sampling=Sampling(temperature=0))
    found = run(engine, [request, free])
    assert found["1"].choices[0].tokens == found["2"].choices[0].tokens


class Dead:
    """Two tokens, and then none."""

    def __init__(self, said: int = 0) -> None:
        self.said = said

    def allowed(self) -> Ints | None:
        return packed(np.zeros(VOCABULARY, bool)) if self.said == 2 else None

    def push(self, token: int) -> None:
        self.said += 1

    def fork(self) -> "Dead":
        return Dead(self.said)


def test_where_no_token_is_left_a_draw_fails_and_beams_answer_as_they_stand(
    pairs: list[Pair],
) -> None:
    engine = engine_of(pairs[0][1], lambda request: Dead() if request.id != "free" else None)
    sampling = Sampling(temperature=0)
    requests = [
        Request(id="drawn", prompt=[1, 3], max_tokens=9, sampling=sampling),
        Request(id="free", prompt=[1, 3], max_tokens=9, sampling=sampling),
        Request(id="beams", prompt=[1, 3], max_tokens=9, n=3, beams=Beams(width=3)),
    ]
    found = run(engine, requests)
    assert "leaves no token" in (found["drawn"].error or "")
    assert len(found["free"].choices[0].tokens) == 9
    assert found["beams"].error is None
    assert [len(choice.tokens) for choice in found["beams"].choices] == [2] * 3
