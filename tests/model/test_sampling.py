"""Seats against transformers' processors, and against themselves in other company."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers.generation import logits_process as hf

from model.batch import Seat
from model.sampling import Sampling, packed
from model.seats import Masks, Seats

V = 97  # not a multiple of 32: the last word of a mask is not full
START = 6  # length of the prompts here


def random_sampling(rng: np.random.Generator, stops: tuple[int, ...] = (3, 5)) -> Sampling:
    """Each parameter is on in about half of all draws."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    ids = [int(i) for i in rng.permutation(V)]
    words = ((ids[0],), (ids[1],))
    return Sampling(
        temperature=maybe(float(rng.uniform(0.3, 2)), 1.0),
        top_k=maybe(int(rng.integers(2, 40)), 0),
        top_p=maybe(float(rng.uniform(0.2, 0.99)), 1.0),
        min_p=maybe(float(rng.uniform(0.001, 0.2)), 0.0),
        typical_p=maybe(float(rng.uniform(0.2, 0.99)), 1.0),
        repetition_penalty=maybe(float(rng.uniform(0.7, 1.6)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-1, 1)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-1, 1)), 0.0),
        logit_bias=maybe({i: float(rng.normal()) for i in ids[7:12]}, {}),
        bad_words=maybe(words, ()),
        allowed=maybe(tuple(ids[: V // 2]), ()),
        min_tokens=maybe(int(rng.integers(1, 8)), 0),
        stops=stops,
        seed=int(rng.integers(0, 2**63)),
    )


def random_seat(rng: np.random.Generator, seat: int) -> Seat:
    sampling = random_sampling(rng)
    past = [int(i) for i in rng.integers(0, V, START + int(rng.integers(0, 9)))]
    return Seat(seat, sampling, int(rng.integers(4)), past[:START], past[START:], START)


def past_of(seat: Seat) -> Tensor:
    return torch.tensor([[*seat.prompt, *seat.output]])


def expected_adjustment(seat: Seat, logits: Tensor) -> Tensor:
    """[1, V] through transformers' processors in `generate`'s order, and OpenAI's formula."""
    sampling, past = seat.sampling, past_of(seat)
    bias: dict[tuple[int, ...], float] = {(i,): b for i, b in sampling.logit_bias.items()}
    chain: list[Any] = []
    if bias:
        chain.append(hf.SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.bad_words:
        chain.append(hf.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.min_tokens:
        stops = torch.tensor(sampling.stops)
        chain.append(hf.MinNewTokensLengthLogitsProcessor(START, sampling.min_tokens, stops))
    if sampling.allowed:
        allowed = list(sampling.allowed)
        chain.append(hf.PrefixConstrainedLogitsProcessor(lambda _batch, _past: allowed, 1))
    out: Tensor = hf.LogitsProcessorList(chain)(past, logits.clone())
    drawn = torch.bincount(torch.tensor(seat.output, dtype=torch.int64), minlength=V)
    return out - sampling.frequency_penalty * drawn - sampling.presence_penalty * (drawn > 0)


def taken(capacity: int, seats: Iterable[Seat]) -> Seats:
    made = Seats(capacity, V)
    for seat in seats:
        made.take(seat)
    return made


def positions_of(seats: Iterable[Seat]) -> Any:
    return np.array([START + len(seat.output) for seat in seats])


def test_adjust_equals_transformers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        mine = [random_seat(rng, seat) for seat in range(8)]
        logits = torch.from_numpy(rng.normal(size=(8, V)).astype(np.float32) * 3)
        kept = logits.clone()
        got = taken(8, mine).adjust(logits, np.arange(8), positions_of(mine))
        wanted = torch.cat([expected_adjustment(s, logits[i : i + 1]) for i, s in enumerate(mine)])
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(logits, kept), "the model's own logits are still needed"


def test_best_is_penalised_after_the_softmax_and_not_normalised() -> None:
    rng = np.random.default_rng(1)
    mine = [random_seat(rng, seat) for seat in range(16)]
    logits = torch.from_numpy(rng.normal(size=(16, V)).astype(np.float32) * 3)
    values, ids = taken(16, mine).best(logits, np.arange(16), positions_of(mine), 5)
    for row, seat in enumerate(mine):
        wanted = expected_adjustment(seat, logits[row : row + 1].log_softmax(-1)).topk(5)
        torch.testing.assert_close(values[row], wanted.values[0], rtol=1e-5, atol=1e-5)
        assert ids[row].tolist() == wanted.indices[0].tolist()


def test_feeding_equals_taking_with_the_longer_past() -> None:
    """Also when known tokens are fed again, as after preemption."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        whole = [random_seat(rng, seat) for seat in range(6)]
        seats = taken(6, [Seat(s.seat, s.sampling, s.branch, s.prompt, [], START) for s in whole])
        for position in range(START - 2, START + 9):
            now = [s for s in whole if position < START + len(s.output)]
            tokens = torch.tensor([[*s.prompt, *s.output][position] for s in now])
            owners = np.array([s.seat for s in now], np.int32)
            seats.feed(owners, tokens, np.full(len(now), position))
        logits = torch.from_numpy(rng.normal(size=(6, V)).astype(np.float32))
        at = np.arange(6)
        wanted = taken(6, whole).adjust(logits, at, positions_of(whole))
        assert torch.equal(seats.adjust(logits, at, positions_of(whole)), wanted)


def test_forks_read_before_they_write_and_keep_their_draws() -> None:
    rng = np.random.default_rng(3)
    mine = [random_seat(rng, seat) for seat in range(5)]
    logits = torch.from_numpy(rng.normal(size=(1, V)).astype(np.float32)).expand(5, -1)
    positions = positions_of(mine)
    seats, at = taken(5, mine), np.arange(5)
    before = seats.adjust(logits, at, positions)
    keys = seats.keys.copy()
    source = np.array([1, 2, 0, 0, 4])
    seats.fork(np.stack([source, at], 1)[:4])
    assert torch.equal(seats.adjust(logits, at, positions[source]), before[source])
    assert (seats.keys == keys).all()


def test_a_seat_forgets_who_sat_there() -> None:
    rng = np.random.default_rng(4)
    seats = Seats(1, V)
    logits = torch.from_numpy(rng.normal(size=(1, V)).astype(np.float32))
    for _ in range(50):
        mine = random_seat(rng, 0)
        seats.take(mine)
        got = seats.adjust(logits, np.zeros(1, np.int32), positions_of([mine]))
        wanted = taken(1, [mine]).adjust(logits, np.zeros(1, np.int32), positions_of([mine]))
        assert torch.equal(got, wanted)


def test_a_row_is_drawn_alone_as_in_company() -> None:
    rng = np.random.default_rng(5)
    mine = [random_seat(rng, seat) for seat in range(64)]
    logits = torch.from_numpy(rng.normal(size=(64, V)).astype(np.float32) * 3)
    seats, positions = taken(64, mine), positions_of(mine)
    together = seats.sample(logits, np.arange(64), positions)
    order = rng.permutation(64)
    assert torch.equal(seats.sample(logits[order], order, positions[order]), together[order])
    for i in range(64):
        alone = taken(64, [mine[i]]).sample(
            logits[i : i + 1].clone(), np.array([i]), positions[i : i + 1]
        )
        assert alone.item() == together[i]


def test_draws_follow_the_distribution_over_positions_branches_and_seeds() -> None:
    """Chi-square at 1e-4: a wrong sampler fails, a right one once in 10,000 changes of the hash."""
    logits = torch.from_numpy(np.random.default_rng(6).normal(size=V).astype(np.float32) * 1.5)
    share = logits.double().softmax(-1).numpy()
    count = 20_000
    seats = Seats(count, V)
    for seat in range(count):
        seats.keys[seat] = 0
    one = np.zeros(count, np.int32)

    def drawn(at: Any, positions: Any) -> Any:
        return seats.sample(logits.expand(count, -1), at, positions)

    seats.take(Seat(0, Sampling(seed=1), 0, [], []))
    by_position = drawn(one, np.arange(count))
    for seat in range(count):
        seats.take(Seat(seat, Sampling(seed=1), seat, [], []))
    by_branch = drawn(np.arange(count), one)
    for seat in range(count):
        seats.take(Seat(seat, Sampling(seed=seat), 0, [], []))
    by_seed = drawn(np.arange(count), one)
    for tokens in (by_position, by_branch, by_seed):
        seen = np.bincount(tokens.numpy(), minlength=V)
        assert stats.chisquare(seen, share * count).pvalue > 1e-4
    # The three streams have nothing to do with each other: pairs fall as the product.
    for a, b in ((by_position, by_branch), (by_position, by_seed), (by_branch, by_seed)):
        table = np.histogram2d(a.numpy() % 8, b.numpy() % 8, bins=8)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_takes_the_smallest_of_the_best_ids(change: dict[str, Any]) -> None:
    logits = torch.zeros(3, V)
    logits[:, [40, 41]] = 7.0
    seats = taken(3, [Seat(i, Sampling(seed=i, **change), 0, [], []) for i in range(3)])
    assert seats.sample(logits, np.arange(3), np.arange(3)).tolist() == [40] * 3


def test_min_tokens_bans_stops_only_until_then() -> None:
    seats = taken(1, [Seat(0, Sampling(temperature=0, min_tokens=2, stops=(9,)), 0, [], [], 10)])
    logits = torch.zeros(4, V)
    logits[:, 9], logits[:, 8] = 5, 4
    assert seats.sample(logits, np.zeros(4, int), np.arange(10, 14)).tolist() == [8, 8, 9, 9]


def test_nothing_left_or_not_a_number_is_minus_one_and_nobody_elses() -> None:
    empty = Sampling(allowed=(4,), bad_words=((4,),))
    for other in (Sampling(temperature=0), Sampling(top_k=3)):
        seats = taken(3, [Seat(0, empty, 0, [], []), Seat(1, other, 0, [], [])])
        logits = torch.zeros(3, V)
        logits[1, 7], logits[2, 50] = 60, torch.nan
        found = seats.sample(logits, np.array([0, 1, 1]), np.zeros(3, int))
        assert found.tolist() == [-1, 7, -1]


def test_state_is_made_only_for_seats_that_ask() -> None:
    seats = Seats(4096, 152_000)
    for seat in range(4096):
        seats.take(Seat(seat, Sampling(top_p=0.9), 0, [], []))
    assert len(seats.counts.rows) == len(seats.masks.rows) == 1
    for _ in range(3):  # taken again and again, one slot is enough
        seats.take(Seat(7, Sampling(presence_penalty=1, allowed=(1, 2)), 0, [1], [], 1))
    assert len(seats.counts.rows) == len(seats.masks.rows) == 1


def test_masks_of_a_step_come_on_top_of_what_seats_say() -> None:
    """Each row of one seat under a mask of its own, which is what guesses need."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        mine = [random_seat(rng, seat) for seat in range(4)]
        seats, owners = taken(4, mine), rng.integers(0, 4, 9)
        positions = positions_of(mine)[owners]
        logits = torch.from_numpy(rng.normal(size=(9, V)).astype(np.float32) * 3)
        truths = rng.random((5, V)) < 0.6
        words = torch.from_numpy(np.stack([packed(row) for row in truths]))
        rows = rng.integers(-1, 5, 9)
        got = seats.adjust(logits, owners, positions, Masks(words, rows))
        wanted = seats.adjust(logits, owners, positions)
        banned = torch.from_numpy(~truths[rows] & (rows >= 0)[:, None])
        assert torch.equal(got, wanted.masked_fill(banned, -torch.inf))
