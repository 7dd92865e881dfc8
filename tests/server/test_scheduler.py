"""The scheduler's promises, one by one, over the executor that hashes the pages it reads back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.batch import LAST_SAMPLE, Batch, Output
from model.sampling import Sampling
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.fold import join
from server.engine.lobby import MOST_REMEMBERED
from server.engine.pages import Pages
from server.engine.request import Beams, Event, Request
from server.errors import Duplicate, InvalidField, LimitExceeded, QueueFull, Refused, TooLong
from tests.server.simulation import oracle
from tests.server.simulation.executor import VOCABULARY, Simulated
from tests.server.simulation.words import text

GREEDY = Sampling(temperature=0.0)


class Recorder(Simulated):
    """Remembers what it was asked to do."""

    def __init__(self, pages: int, size: int) -> None:
        super().__init__(pages, size)
        self.batches: list[Batch] = []
        self.poison: set[int] = set()  # tokens that no step survives

    def launch(self, batch: Batch) -> Callable[[], Output]:
        self.batches.append(batch)
        if self.poison & set(batch.tokens.tolist()):
            raise RuntimeError("poison")
        return super().launch(batch)

    @property
    def computed(self) -> int:
        return sum(len(batch.tokens) for batch in self.batches)


class Bench:
    """An engine on a bench, with its clock and its executor in reach."""

    def __init__(self, pages: int = 256, size: int = 4, caching: bool = True, **options: Any):
        self.now = 100.0
        self.executor = Recorder(pages, size)
        self.pages = Pages(pages, size, caching=caching)
        options = {"vocabulary": VOCABULARY, "seats": 16, **options}
        clock = lambda: self.now  # noqa: E731
        self.engine = Engine(self.executor, self.pages, Options(**options), text=text, clock=clock)
        self.said: dict[str, Event] = {}
        self.asked: list[Request] = []

    def submit(self, *prompt: int, id: str = "", **fields: Any) -> Request:
        fields = {"max_tokens": 5, "sampling": GREEDY, **fields}
        request = Request(id=id or f"r{len(self.asked)}", prompt=list(prompt), **fields)
        self.engine.submit(request)
        self.asked.append(request)
        return request

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for event in self.engine.step():
                old = self.said.get(event.id)
                self.said[event.id] = join(old, event) if old else event
            self.engine.scheduler.check()

    def finish(self) -> dict[str, Event]:
        for _ in range(5000):
            if self.engine.idle:
                break
            self.step()
        assert self.engine.idle
        assert self.pages.live == 0
        return self.said

    def right(self, request: Request) -> bool:
        """Whether it got what it gets alone."""
        event = self.said[request.id]
        told = {choice.index: choice for choice in event.choices}
        for index, expected in enumerate(oracle.alone(request)):
            choice = told[index]
            assert (choice.tokens, choice.text) == (expected.tokens, expected.text)
            assert (choice.finish, choice.stop) == (expected.finish, expected.stop)
            assert choice.logprobs == expected.logprobs
        return event.done and event.error is None


# ── shared pages ──────────────────────────────────────────────────────────────────────────────


def test_branches_hold_their_prompt_once() -> None:
    bench = Bench(pages=256, size=16, budget=2048)
    request = bench.submit(*[i % VOCABULARY for i in range(1000)], n=8, sampling=Sampling(seed=1))
    bench.step()
    assert bench.pages.live == 63  # ⌈1000 / 16⌉
    assert len(bench.executor.batches[0].sample_at) == 8  # from one row of logits
    bench.step(3)
    assert bench.pages.live == 62 + 8  # the half-filled page is everyone's own
    bench.finish()
    assert bench.right(request)
    assert bench.executor.computed == 1000 + 8 * 4


def test_a_known_prefix_is_not_computed_again() -> None:
    bench = Bench(pages=512, size=16, budget=4096)
    shared = [i * 7 % VOCABULARY for i in range(2000)]
    bench.submit(*shared, 1)
    bench.finish()
    before = bench.executor.computed
    second = bench.submit(*shared, 2)
    event = bench.finish()[second.id]
    assert bench.executor.computed - before - 4 < 32
    assert event.cached_tokens == 2000
    assert bench.right(second)


def test_two_at_once_share_what_the_first_has_finished() -> None:
    bench = Bench(size=4, budget=8, chunk=8)
    prompt = list(range(40))
    first, second = bench.submit(*prompt, 1), bench.submit(*prompt, 2)
    bench.finish()
    assert bench.right(first)
    assert bench.right(second)
    assert bench.said[second.id].cached_tokens == 40
    assert bench.executor.computed < 41 + 1 + 2 * 5


def test_prompt_logprobs_are_computed_though_the_prompt_is_known() -> None:
    bench = Bench()
    prompt = list(range(20))
    bench.submit(*prompt)
    bench.finish()
    again = bench.submit(*prompt, prompt_logprobs=2, logprobs=1)
    event = bench.finish()[again.id]
    assert event.prompt_logprobs == oracle.prompt_logprobs(again)
    assert event.cached_tokens == 0
    assert bench.right(again)


def test_a_prompt_can_be_asked_for_its_log_probabilities_alone() -> None:
    bench = Bench(budget=3)
    request = bench.submit(*range(11), max_tokens=0, prompt_logprobs=0, n=2)
    event = bench.finish()[request.id]
    assert event.prompt_logprobs == oracle.prompt_logprobs(request)
    assert [(choice.tokens, choice.finish) for choice in event.choices] == [([], "length")] * 2
    assert bench.executor.computed == 10  # nothing follows the last token


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]])
def test_nothing_asked_is_nothing_computed(prompt: list[int]) -> None:
    bench = Bench()
    scores = 0 if len(prompt) == 1 else None
    request = bench.submit(*prompt, max_tokens=0, prompt_logprobs=scores)
    event = bench.finish()[request.id]
    assert (event.done, event.choices[0].finish) == (True, "length")
    assert event.prompt_logprobs == ([None] if scores == 0 else [])
    assert bench.executor.batches == []


def test_branches_may_end_before_they_part() -> None:
    bench = Bench()
    one = bench.submit(1, 2, 3, n=8, max_tokens=1, sampling=Sampling(seed=3))
    stops = tuple(range(0, VOCABULARY, 2))
    some = bench.submit(4, 5, 6, n=8, max_tokens=9, sampling=Sampling(seed=4, stops=stops))
    bench.finish()
    assert bench.right(one)
    assert bench.right(some)


# ── order ─────────────────────────────────────────────────────────────────────────────────────


def test_a_long_prompt_never_holds_up_a_stream() -> None:
    bench = Bench(pages=512, budget=16, chunk=8)
    stream = bench.submit(1, 2, max_tokens=40)
    bench.step(2)
    bench.submit(*[i % VOCABULARY for i in range(400)])
    said = len(bench.said[stream.id].choices[0].tokens)
    for _ in range(20):
        bench.step()
        said += 1
        assert len(bench.said[stream.id].choices[0].tokens) == said
    assert all(len(batch.tokens) <= 16 for batch in bench.executor.batches)


def test_a_long_prompt_leaves_room_for_short_ones() -> None:
    bench = Bench(pages=512, budget=32, chunk=8)
    bench.submit(*[i % VOCABULARY for i in range(800)])
    bench.step()
    short = bench.submit(1, 2, 3, max_tokens=1)
    bench.step()
    assert bench.said[short.id].done


def test_a_prompt_alone_takes_the_whole_budget() -> None:
    bench = Bench(pages=512, budget=32, chunk=8)
    bench.submit(*[i % VOCABULARY for i in range(100)])
    bench.step()
    assert len(bench.executor.batches[0].tokens) == 32


def order(bench: Bench) -> list[str]:
    """Who had its first step when; one seat makes it a line."""
    bench.finish()
    return list(bench.said)


def test_first_come_first_served() -> None:
    bench = Bench(seats=1)
    ids = [bench.submit(i, max_tokens=1).id for i in range(6)]
    assert order(bench) == ids


def test_priority_goes_first_until_waiting_has_outweighed_it() -> None:
    bench = Bench(seats=1, aging=10.0)
    bench.submit(1, id="running", max_tokens=3)
    bench.step()
    for id, priority in [("late", 2), ("normal", 0), ("urgent", -1)]:
        bench.submit(2, id=id, priority=priority, max_tokens=1)
        bench.now += 1.0
    bench.now += 25.0
    bench.submit(3, id="newcomer", max_tokens=1)
    assert order(bench) == ["running", "urgent", "normal", "late", "newcomer"]


# ── the door ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"prompt": []}, InvalidField, "no tokens"),
        ({"prompt": [1, VOCABULARY]}, InvalidField, f"token id {VOCABULARY}: ids are 0 to"),
        ({"prompt": [-1]}, InvalidField, "token id -1"),
        ({"max_tokens": -1}, InvalidField, "max_tokens is -1"),
        ({"n": 0}, InvalidField, "n is 0"),
        ({"n": 17}, LimitExceeded, "17 branches are asked for, but 16"),
        ({"beams": Beams(width=9)}, LimitExceeded, "9 branches are asked for, but 8"),
        ({"max_tokens": 62}, TooLong, "65 of them"),
        ({"max_tokens": 40, "n": 2}, TooLong, "can need 22 pages of 4 tokens, but there are 16"),
        ({"beams": Beams(width=40)}, LimitExceeded, "40 branches"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(
    fields: dict[str, Any], error: type[Refused], says: str
) -> None:
    bench = Bench(pages=16, size=4, budget=8, context=64)
    request = {"id": "a", "prompt": [1, 2, 3], "max_tokens": 5, **fields}
    with pytest.raises(error) as refused:
        bench.engine.submit(Request(**request))
    if error is not TooLong or "context" not in str(refused.value):
        assert says in str(refused.value)
    assert bench.engine.idle
    assert sum(bench.engine.stats.rejected.values()) == 1


def test_the_longest_that_fits_is_served() -> None:
    bench = Bench(pages=16, size=4)
    request = bench.submit(1, 2, 3, max_tokens=62)  # the last token needs no place
    bench.finish()
    assert bench.right(request)
    with pytest.raises(TooLong):
        bench.submit(1, 2, 3, max_tokens=63)


def test_a_full_queue_says_so_and_empties() -> None:
    bench = Bench(seats=1, queue=2)
    bench.submit(1, max_tokens=9)
    bench.step()
    for _ in range(2):
        bench.submit(1, max_tokens=2)
    with pytest.raises(QueueFull, match="2 requests of about 6 tokens wait already"):
        bench.submit(1)
    bench.finish()
    bench.submit(1)
    assert bench.engine.stats.rejected == {"queue_full": 1}


def test_a_queue_is_full_of_tokens_too_but_takes_one_of_any_length() -> None:
    bench = Bench(seats=1, queue_tokens=20)
    bench.submit(1, max_tokens=30)
    bench.step()
    bench.submit(1, max_tokens=30)
    with pytest.raises(QueueFull):
        bench.submit(1, max_tokens=1)


def test_who_names_no_length_does_not_fill_the_queue_with_a_whole_context() -> None:
    """Such a chat asks for all that the context leaves; a hundred of them wait all the same."""
    bench = Bench(pages=1 << 14, size=4, seats=1, queue_tokens=1 << 16)
    for _ in range((1 << 16) // 513):
        bench.submit(1, max_tokens=60_000)
    with pytest.raises(QueueFull, match="127 requests of about 65151 tokens"):
        bench.submit(1, max_tokens=60_000)


def test_an_id_is_used_once_at_a_time() -> None:
    bench = Bench()
    bench.submit(1, id="a")
    with pytest.raises(Duplicate):
        bench.submit(2, id="a")
    bench.finish()
    bench.submit(2, id="a")


@pytest.mark.parametrize("wrong", [{"seats": 0}, {"budget": 0}, {"queue": 0}, {"ahead": 2}])
def test_impossible_options_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is {wrong[name]}"):
        Options(**wrong)


# ── the end ───────────────────────────────────────────────────────────────────────────────────


def test_time_is_up_wherever_it_is() -> None:
    bench = Bench(seats=1)
    running = bench.submit(1, deadline=5.0, max_tokens=60)
    waiting = bench.submit(2, deadline=4.0)
    hasty = bench.submit(3, queue_timeout=3.0)
    bench.step(3)
    bench.now += 3.0
    bench.step()
    assert (bench.said[hasty.id].code, len(bench.said)) == ("queue_timeout", 2)
    bench.now += 1.0
    bench.step()
    assert (bench.said[waiting.id].code, len(bench.said)) == ("deadline_exceeded", 3)
    bench.now += 1.0
    bench.step()
    assert bench.said[running.id].code == "deadline_exceeded"
    assert len(bench.said[running.id].choices[0].tokens) == 5
    assert bench.engine.idle
    assert bench.engine.stats.aborted == {"decode": 1, "queue": 2}


def test_the_first_event_says_how_long_it_waited() -> None:
    bench = Bench(seats=1)
    first, second = bench.submit(1, max_tokens=2), bench.submit(2, max_tokens=2)
    bench.step()
    bench.now += 3
    bench.finish()
    assert (bench.said[first.id].queued, bench.said[second.id].queued) == (0.0, 3.0)
    assert bench.engine.stats.step_sizes[:2] == [4, 0]


def test_who_began_in_time_is_not_timed_out_of_the_queue() -> None:
    bench = Bench()
    request = bench.submit(1, queue_timeout=1.0, max_tokens=9)
    bench.step()
    bench.now += 100.0
    bench.finish()
    assert bench.right(request)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_cancellation_ends_it_in_any_state(ahead: int) -> None:
    bench = Bench(seats=2, budget=4, ahead=ahead)
    bench.engine.cancel("early")
    decoding = bench.submit(1, max_tokens=50)
    bench.step(2)
    computing, waiting = bench.submit(*range(40)), bench.submit(2)
    bench.step()
    early = bench.submit(3, id="early")
    for request in (decoding, computing, waiting):
        bench.engine.cancel(request.id)
        bench.engine.cancel(request.id)
    bench.step()
    for request in (decoding, computing, waiting, early):
        event = bench.said[request.id]
        assert (event.done, event.choices[-1].finish, event.error) == (True, "cancelled", None)
    bench.step()
    assert bench.engine.idle
    assert bench.pages.live == 0
    assert bench.engine.stats.finished == {"cancelled": 4}


def test_cancellations_are_remembered_for_a_while_and_not_all() -> None:
    bench = Bench()
    bench.engine.cancel("too late")
    bench.now += 61.0
    bench.step()
    bench.submit(1, id="too late", max_tokens=1)
    for i in range(MOST_REMEMBERED + 1):
        bench.engine.cancel(f"c{i}")
    bench.submit(1, id="c0", max_tokens=1)
    bench.submit(1, id=f"c{MOST_REMEMBERED}", max_tokens=1)
    bench.finish()
    assert [event.choices[-1].finish for event in bench.said.values()] == [
        "cancelled",
        "length",
        "length",
    ]
    assert bench.said[f"c{MOST_REMEMBERED}"].choices[0].tokens == []


# ── too few pages ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("caching", [True, False])
def test_too_few_pages_change_nothing_but_the_time(caching: bool, ahead: int) -> None:
    bench = Bench(pages=20, size=2, caching=caching, ahead=ahead, queue_tokens=1000)
    requests = [
        bench.submit(1, 2, i, max_tokens=16, n=1 + i % 2 * (i < 4), sampling=Sampling(seed=i))
        for i in range(9)
    ]
    bench.finish()
    assert all(bench.right(request) for request in requests)
    assert bench.engine.stats.preemptions > 3


def test_the_newest_gives_way_and_after_three_times_nobody_can_move_it() -> None:
    bench = Bench(pages=16, size=1, caching=False)
    old = bench.submit(1, max_tokens=14)
    bench.step()
    new = bench.submit(2, max_tokens=14)
    groups = bench.engine.scheduler._groups
    most = 0
    while not bench.engine.idle:
        bench.step()
        most = max([most, *(group.preempted for group in groups.values())])
        if old.id in groups:
            assert groups[old.id].preempted == 0
    assert 0 < most <= 3
    assert bench.right(old)
    assert bench.right(new)


def test_beams_give_way_together_and_grow_again_from_one_stem() -> None:
    bench = Bench(pages=30, size=2, caching=False)
    first = bench.submit(*range(10), max_tokens=40)
    bench.step(12)
    beams = bench.submit(*range(8), max_tokens=12, beams=Beams(width=4))
    while not bench.engine.stats.preemptions:
        assert not bench.engine.idle
        bench.step()
    group = bench.engine.scheduler._groups[beams.id]
    assert len(group.branches) == 1
    assert all(bud.fork_at >= 8 for bud in group.buds)
    known = {tuple(b.output[:i]) for b in group.living for i in range(1, len(b.output) + 1)}
    twice = len(group.living) - 1  # each bud computes its last token itself, though it may be known
    assert 8 + len(known) <= group.missing <= 8 + len(known) + twice
    bench.finish()
    assert bench.right(first)
    assert bench.right(beams)


# ── guesses ───────────────────────────────────────────────────────────────────────────────────


class Parrot(Recorder):
    """Says the prompt's cycle of five again and again."""

    def _sample(self, context: int, seat: int, position: int) -> int:
        self.seats[seat].last = 10 + position % 5
        return 10 + position % 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_good_guesses_save_steps_and_change_nothing_else(temperature: float) -> None:
    said = []
    for draft in (0, 4):
        bench = Bench(draft=draft)
        bench.executor = Parrot(256, 4)
        bench.engine._executor = bench.executor
        prompt = [10 + i % 5 for i in range(20)]
        sampling = Sampling(temperature=temperature, seed=2)
        request = bench.submit(*prompt, max_tokens=33, sampling=sampling, logprobs=1)
        event = bench.finish()[request.id]
        said.append((event.choices[0].tokens, event.choices[0].logprobs))
        steps = bench.engine.stats.steps
        assert steps == 33 if not draft else steps <= 9
        assert bench.engine.stats.accepted == 33 - steps
    assert said[0] == said[1]


def test_bad_guesses_cost_little_and_change_nothing() -> None:
    bench = Bench(pages=1024, budget=4096, draft=6)
    pairs = [token for i in range(500) for token in (i * i % VOCABULARY, i % VOCABULARY)]
    requests = [
        bench.submit(*pairs, i, max_tokens=30, sampling=Sampling(seed=i), stop=("abc",))
        for i in range(4)
    ]
    bench.finish()
    assert all(bench.right(request) for request in requests)
    assert bench.engine.stats.drafted > bench.engine.stats.accepted


def test_no_guesses_where_sampling_looks_back() -> None:
    bench = Bench(draft=4)
    penalised = Sampling(temperature=0.0, repetition_penalty=1.5)
    request = bench.submit(*[1, 2, 3] * 5, max_tokens=20, sampling=penalised)
    bench.finish()
    assert bench.engine.stats.drafted == 0
    assert bench.right(request)


# ── one step ahead ────────────────────────────────────────────────────────────────────────────


def test_a_step_ahead_asks_for_what_nobody_has_seen() -> None:
    bench = Bench(ahead=1)
    request = bench.submit(1, 2, 3, max_tokens=6)
    bench.step()
    assert [batch.tokens.tolist() for batch in bench.executor.batches] == [[1, 2, 3], [LAST_SAMPLE]]
    bench.finish()
    assert bench.right(request)
    assert bench.engine.stats.steps == 6  # the last one was known to be the last


def test_a_stop_found_late_costs_one_row() -> None:
    bench = Bench(ahead=1)
    alone = oracle.alone(Request(id="", prompt=[1, 2], max_tokens=9, sampling=GREEDY))[0].tokens
    stop = alone[3]
    steps = alone.index(stop) + 1
    request = bench.submit(1, 2, max_tokens=9, sampling=Sampling(temperature=0, stops=(stop,)))
    bench.finish()
    assert bench.right(request)
    assert bench.engine.stats.steps == steps + 1
    assert bench.engine.stats.output_tokens == steps


@pytest.mark.parametrize("fields", [{"beams": Beams(width=2)}, {"draft": 3}])
def test_what_decides_the_next_step_is_waited_for(fields: dict[str, Any]) -> None:
    bench = Bench(ahead=1)
    request = bench.submit(1, 2, 3, max_tokens=8, **fields)
    bench.finish()
    assert bench.right(request)
    assert all(LAST_SAMPLE not in batch.tokens for batch in bench.executor.batches)


# ── failures ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("where", ["fail_launch", "fail_wait"])
def test_a_failed_step_is_tried_again(where: str, ahead: int) -> None:
    bench = Bench(ahead=ahead)
    requests = [bench.submit(1, 2, i, n=1 + i % 3, max_tokens=6) for i in range(6)]
    bench.step(2)
    setattr(bench.executor, where, True)
    bench.finish()
    assert all(bench.right(request) for request in requests)
    assert bench.engine.stats.retries == 1


def test_what_was_launched_after_a_failed_step_may_fail_too() -> None:
    class Broken(Recorder):
        waits = 0

        def launch(self, batch: Batch) -> Callable[[], Output]:
            wait = super().launch(batch)
            return self._broken if len(self.batches) in (3, 4) else wait

        def _broken(self) -> Output:
            Broken.waits += 1
            raise RuntimeError("device lost for a moment")

    bench = Bench(ahead=1)
    bench.engine._executor = Broken(256, 4)
    request = bench.submit(1, 2, 3, max_tokens=9)
    bench.finish()
    assert Broken.waits == 2
    assert bench.right(request)


@pytest.mark.parametrize("says", ["CUDA error: device-side assert triggered", "no"])
def test_an_engine_beyond_help_says_so(says: str) -> None:
    class Lost(Recorder):
        def launch(self, batch: Batch) -> Callable[[], Output]:
            raise RuntimeError(says)

    bench = Bench()
    bench.engine._executor = Lost(256, 4)
    for _ in range(100):
        bench.submit(1)
    with pytest.raises(RuntimeError, match=says):
        bench.finish()
    failed = bench.engine.stats.finished.get("error", 0)
    assert (0 < failed < 100) if says == "no" else failed == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_who_makes_steps_fail_fails_alone(ahead: int) -> None:
    bench = Bench(ahead=ahead)
    bench.executor.poison = {60}
    good = [bench.submit(1, 2, i, max_tokens=6) for i in range(5)]
    bench.step()
    bad = bench.submit(60, 3, 4)
    more = [bench.submit(4, 5, i, max_tokens=6) for i in range(3)]
    event = bench.finish()[bad.id]
    assert (event.code, event.done) == ("step_failed", True)
    for request in good + more:
        (alone,) = oracle.alone(request)
        if 60 not in alone.tokens:
            assert bench.right(request)
        elif not ahead:  # else it goes from step to step unseen
            assert bench.said[request.id].code == "step_failed"


def test_numbers_that_are_none_fail_their_request_and_are_not_found_again() -> None:
    bench = Bench(size=2)
    good, bad = bench.submit(1, 2, 3), bench.submit(*range(8), n=2)
    bench.executor.nan_row = 1
    bench.step()
    assert bench.said[bad.id].code == "numerical_error"
    assert [choice.finish for choice in bench.said[bad.id].choices] == ["error", "error"]
    again = bench.submit(*range(8))
    bench.finish()
    assert bench.right(good)
    assert bench.right(again)
    assert bench.said[again.id].cached_tokens == 0
    assert bench.engine.stats.nan_rows == 1


def test_candidates_that_are_no_numbers_fail_their_search() -> None:
    class Nowhere(Recorder):
        def _successors(self, *asked: Any) -> list[tuple[int, float]]:
            return [(token, np.nan) for token, _ in super()._successors(*asked)]

    bench = Bench()
    bench.engine._executor = Nowhere(256, 4)
    search, other = bench.submit(1, 2, beams=Beams(width=2)), bench.submit(3)
    assert bench.finish()[search.id].code == "numerical_error"
    assert bench.right(other)


def test_pages_that_lack_where_none_can_are_an_error_of_ours() -> None:
    bench = Bench(pages=8, size=1)
    bench.submit(1, max_tokens=8)
    bench.step()
    (group,) = bench.engine.scheduler.running
    group.preempted = 3
    while bench.pages.free:
        bench.pages.take()
    with pytest.raises(RuntimeError, match="sure to fit"):
        bench.engine.step()


def test_check_sees_a_lost_seat_and_a_lost_request() -> None:
    bench = Bench()
    bench.submit(1)
    bench.step()
    scheduler = bench.engine.scheduler
    scheduler._groups["ghost"] = scheduler.running.newest
    with pytest.raises(RuntimeError, match="request is lost"):
        scheduler.check()
    scheduler._holdings.vacant.pop()
    with pytest.raises(RuntimeError, match="seat is lost"):
        scheduler.check()


# ── everything, at every size ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
@pytest.mark.parametrize("draft", [0, 3])
def test_the_size_of_chunks_changes_nothing(chunk: int, draft: int) -> None:
    bench = Bench(pages=160, size=4, chunk=chunk, budget=2 * chunk + 8, draft=draft)
    shared = [i * 5 % VOCABULARY for i in range(30)]
    requests = [
        bench.submit(
            *shared[: 5 * i],
            i,
            max_tokens=4 + i,
            n=1 + i % 2,
            logprobs=i % 3 or None,
            sampling=Sampling(seed=i, repetition_penalty=1.0 + i % 2),
        )
        for i in range(7)
    ] + [bench.submit(*shared, max_tokens=6, beams=Beams(width=3), logprobs=2)]
    bench.finish()
    assert all(bench.right(request) for request in requests)
