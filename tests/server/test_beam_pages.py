"""How beams share pages: the algorithm's five invariants, its copies counted, and its price."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.batch import Batch, Output
from model.sampling import Sampling
from server.engine.admission import Options
from server.engine.beam_group import BeamGroup, Grown
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Beams, Event, Request
from server.engine.tree import Node
from tests.server.beam_oracle import tokens_of
from tests.server.simulation.executor import VOCABULARY, Simulated, slot, successors


class Watched(Simulated):
    """Looks at every batch before it runs, and at the books after."""

    def __init__(self, pages: int, size: int) -> None:
        super().__init__(pages, size)
        self.copied: list[tuple[int, int, int]] = []
        self.most = 0  # copies of one step

    def launch(self, batch: Batch) -> Callable[[], Output]:
        self._writes_are_alone(batch)
        self._copies_cross_nowhere(batch)
        return super().launch(batch)

    def _writes_are_alone(self, batch: Batch) -> None:
        """I2, I3: a page that a row writes is in no other row's table."""
        read = [row[: -(-n // self.size)] for row, n in zip(batch.page_table, batch.lengths)]
        for row, pages in enumerate(read):
            count = batch.starts[row + 1] - batch.starts[row]
            written = set(pages[(batch.lengths[row] - count) // self.size :].tolist())
            others = {p for i, pages in enumerate(read) if i != row for p in pages.tolist()}
            assert not written & others

    def _copies_cross_nowhere(self, batch: Batch) -> None:
        """I4, and no copy holds what its row will write anyway."""
        copies = batch.copies.tolist()
        sources, targets = {c[0] for c in copies}, [c[1] for c in copies]
        assert not sources & set(targets)
        assert len(targets) == len(set(targets))
        assert all(0 < slots < self.size for *_, slots in copies)
        self.copied += copies
        self.most = max(self.most, len(copies))


def engine_of(pages: int, size: int, **options: Any) -> tuple[Engine, Watched, Pages]:
    executor, books = Watched(pages, size), Pages(pages, size)
    return Engine(executor, books, Options(vocabulary=VOCABULARY, **options)), executor, books


def beam_request(id: str, prompt: list[int], most: int, n: int = 1, **beams: Any) -> Request:
    stops = tuple(beams.pop("stops", ()))
    return Request(
        id=id, prompt=prompt, max_tokens=most, n=n, sampling=Sampling(stops=stops),
        beams=Beams(**beams),
    )  # fmt: skip


def expected(request: Request) -> list[tuple[list[int], float]]:
    """The same search with nothing but the simulated model's numbers."""
    group = BeamGroup(request, VOCABULARY)

    def best(node: Node) -> list[tuple[int, float]]:
        tokens = [*request.prompt, *tokens_of(node)]
        context = sum(slot(token, at) for at, token in enumerate(tokens)) & ((1 << 64) - 1)
        return successors(context, 0, request.sampling, group.candidates)

    while not group.done:
        rows = [best(node) for node in group.live]
        tokens = np.array([[token for token, _ in row] for row in rows], np.int32)
        group.advance(tokens, np.array([[x for _, x in row] for row in rows], np.float32))
    return [(tokens_of(e.node), e.score) for e in group.answers]


Answers = dict[str, list[tuple[list[int], float | None]]]


def run(engine: Engine, each: Callable[[], None] = lambda: None) -> tuple[Answers, list[Event]]:
    """Until nothing is left, the books checked after every step (I1)."""
    events = []
    while not engine.idle:
        events += engine.step()
        engine.scheduler.check()
        each()
    answers: dict[str, dict[int, tuple[list[int], float | None]]] = {}
    for event in events:
        assert event.error is None, event.error
        for choice in event.choices:
            told, _ = answers.setdefault(event.id, {}).get(choice.index, ([], None))
            answers[event.id][choice.index] = (told + choice.tokens, choice.score)
    return {id: [found[i] for i in sorted(found)] for id, found in answers.items()}, events


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("tight", [False, True])
def test_groups_beside_others_keep_the_books_and_their_answers(size: int, tight: bool) -> None:
    rng = random.Random(size)
    preempted = 0
    for _ in range(50):
        pages = -(-70 // size) + 40 // size + 8 if tight else 4000
        engine, _, books = engine_of(pages, size, budget=rng.choice([24, 512]), queue_tokens=9999)
        asked = []
        for i in range(rng.randint(2, 6)):
            width = rng.randint(2, 5)
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))]
            request = beam_request(
                f"beam-{i}", prompt, rng.randint(1, 8), rng.randint(1, width), width=width,
                stops=rng.sample(range(VOCABULARY), rng.randint(0, 3)),
                length_penalty=rng.choice([0.0, 1.0, 2.0]), exact_exit=rng.random() < 0.5,
            )  # fmt: skip
            asked.append(request)
            engine.submit(request)
            for j in range(rng.randint(0, 5)):
                near = prompt if rng.random() < 0.5 else [*prompt[: len(prompt) // 2], 1]
                engine.submit(Request(id=f"other-{i}-{j}", prompt=near, max_tokens=9))
        answers, _ = run(engine)
        for request in asked:
            assert answers[request.id] == expected(request)
        assert books.live == 0, "I5: all comes back"
        assert books.free + books.cached == books.count
        preempted += engine.stats.preemptions
    assert bool(preempted) == tight


def test_a_group_that_is_cancelled_gives_everything_back() -> None:
    for steps in range(1, 9):
        engine, _, books = engine_of(200, 4)
        engine.submit(beam_request("gone", list(range(21)), 30, width=5))
        engine.submit(beam_request("stays", list(range(50)), 6, width=3))
        for _ in range(steps):
            engine.step()
        engine.cancel("gone")
        while not engine.idle:
            engine.step()
            engine.scheduler.check()
        assert books.live == 0


@pytest.mark.parametrize("prompt", [5, 16, 32, 33])
def test_a_parent_of_c_children_costs_c_minus_one_copies(
    prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where a page has just been filled."""
    size, due, real = 16, 0, BeamGroup.advance

    def advance(self: BeamGroup, *args: Any) -> Grown:
        nonlocal due
        stored = prompt + self.searches[0].length
        grown = real(self, *args)
        if stored % size:
            due += len(grown.parents) - len(set(grown.parents))
        return grown

    monkeypatch.setattr(BeamGroup, "advance", advance)
    engine, executor, _ = engine_of(400, size)
    engine.submit(beam_request("one", [7 * i % VOCABULARY for i in range(prompt)], 40, width=6))
    run(engine)
    assert len(executor.copied) == due > 20
    assert executor.most <= 5, "at most width - 1 a step"


@pytest.mark.parametrize("apart", [False, True])
def test_four_beams_of_a_long_prompt_cost_less_than_half_of_copies(apart: bool) -> None:
    """Even where diverse groups part at the first token and never meet again."""
    size, prompt, most, width = 16, 512, 128, 4
    engine, executor, books = engine_of(400, size)
    tokens = [11 * i % VOCABULARY for i in range(prompt)]
    beams: dict[str, Any] = {"groups": 4, "diversity_penalty": 99.0} if apart else {}
    engine.submit(beam_request("one", tokens, most, width=width, exact_exit=False, **beams))
    peak = 0

    def note() -> None:
        nonlocal peak
        peak = max(peak, books.live)

    _, events = run(engine, note)
    assert events[-1].beam_rows == 1 + (most - 1) * width
    naive = width * -(-(prompt + most) // size)
    assert peak <= 0.45 * naive
    assert peak >= -(-(prompt + most) // size), "the books were not looked at"
    assert len(executor.copied) <= most * (width - 1)
