"""A group of beams: what is streamed and never taken back, diverse and drawn beams, tree events."""

import json
import random
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from model.sampling import Sampling
from server.engine.beam import Ending, Floats, Ints, Search, advance, begin
from server.engine.beam_group import BeamGroup, Grown, gumbel
from server.engine.request import Beams, Request
from server.engine.text import Text
from server.engine.tree import Node
from server.errors import InvalidField
from tests.server.beam_oracle import (
    Answer,
    compare,
    generate,
    gpt2,
    live_after,
    llama,
    replaced,
    tokens_of,
    top,
)

VOCABULARY = 14
PROMPT = [3, 4]


class Bank:
    """A model that knows no words: a prefix picks one of a thousand random rows."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY, sharp: float = 1.5) -> None:
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(1009, vocabulary)) * sharp
        logits[:, :3] += rng.normal(size=(1009, 3)) + 1  # the ends
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.logprobs = logprobs.astype(np.float32)
        self.order = np.argsort(-self.logprobs, axis=-1, kind="stable").astype(np.int32)
        self.sorted = np.take_along_axis(self.logprobs, self.order, -1)

    def row(self, seed: int, tokens: list[int]) -> int:
        return hash((seed, *tokens)) % 1009

    def best(self, seed: int, nodes: list[Node]) -> tuple[Ints, Floats]:
        rows = [self.row(seed, tokens_of(node)) for node in nodes]
        return self.order[rows], self.sorted[rows]


BANK = Bank(0)


def request(*, width: int = 4, max_tokens: int = 8, **options: Any) -> Request:
    """Options of the beams, of the request and of its sampling, told apart by name."""
    beams = {k: options.pop(k) for k in [*options] if k in Beams.__struct_fields__}
    sampling = {k: options.pop(k) for k in [*options] if k in Sampling.__struct_fields__}
    return Request(
        id="r", prompt=PROMPT, max_tokens=max_tokens, sampling=Sampling(**sampling),
        beams=Beams(width=width, **beams), **options,
    )  # fmt: skip


def random_request(rng: random.Random, **options: Any) -> Request:
    width = rng.randint(2, 6)
    chosen: dict[str, Any] = {
        "width": width,
        "max_tokens": rng.randint(1, 12),
        "n": rng.randint(1, width),
        "stops": tuple(rng.sample(range(3), rng.randint(0, 3))),
        "length_penalty": rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": rng.choice([False, True, "never"]),
        "exact_exit": rng.random() < 0.5,
        "min_tokens": rng.choice([0, 0, 0, 2]),
    }
    return request(**chosen | options)


def run(
    asked: Request, seed: int = 0, bank: Bank = BANK, **options: Any
) -> Iterator[tuple[BeamGroup, Grown]]:
    group = BeamGroup(asked, bank.order.shape[1] * 99, **options)
    while not group.done:
        rows = group.live
        grown = group.advance(*bank.best(seed, rows))
        assert [node.parent for node in group.live] == [rows[i] for i in grown.parents]
        assert [node.token for node in group.live] == grown.tokens
        yield group, grown


def finished(asked: Request, seed: int = 0, bank: Bank = BANK) -> BeamGroup:
    return [group for group, _ in run(asked, seed, bank)][-1]


def plain(answers: list[Ending]) -> list[tuple[list[int], float, Any]]:
    return [(tokens_of(e.node), e.score, e.stop) for e in answers]


# --- what is certain --------------------------------------------------------------------------


def common(sequences: list[list[int]]) -> list[int]:
    shortest = min(sequences, key=len)
    for i, token in enumerate(shortest):
        if any(sequence[i] != token for sequence in sequences):
            return shortest[:i]
    return shortest


def certain(asked: Request, searches: list[Search]) -> list[int]:
    """The rule, written with lists: best finished, and all who can still beat it."""
    assert asked.beams is not None
    penalty, limit = asked.beams.length_penalty, asked.max_tokens
    pool = [ending for search in searches for ending in search.pool]
    best = min(pool, key=lambda e: (-e.score, e.node.length)) if pool else None
    able = []
    for node in [node for s in searches if not s.stop for node in s.live]:
        length = limit if penalty > 0 else node.length + 1
        reach = np.float32(node.sum) / np.float32(length**penalty)
        if best is None or reach > best.score:
            able.append(tokens_of(node))
    return common(able + ([tokens_of(best.node)] if best else []))


def test_five_thousand_streams_take_nothing_back_and_say_all_there_is() -> None:
    rng, early = random.Random(1), 0
    for seed in range(5000):
        asked = random_request(rng)
        told: list[int] = []
        for group, grown in run(asked, seed):
            told += [node.token for node in grown.fixed]
            early += bool(grown.fixed) and not group.done
            if seed % 5 == 0:
                assert told == certain(asked, group.searches)
        assert told == tokens_of(group.answers[0].node), (seed, asked)
    assert early > 3000, "hardly anything was told before the end: that proves little"


def test_streams_of_diverse_groups_take_nothing_back() -> None:
    rng = random.Random(2)
    for seed in range(600):
        groups = rng.choice([2, 3])
        asked = random_request(
            rng, width=groups * rng.randint(1, 3), n=1, groups=groups,
            diversity_penalty=rng.choice([0.0, 0.5, 2.0]),
        )  # fmt: skip
        told: list[int] = []
        for group, grown in run(asked, seed):
            told += [node.token for node in grown.fixed]
            assert told == certain(asked, group.searches)
        assert told == tokens_of(group.answers[0].node)


def test_a_windowed_stream_lags_no_more_than_its_window() -> None:
    rng, differ = random.Random(3), 0
    for seed in range(600):
        window = rng.randint(1, 4)
        asked = random_request(rng, max_tokens=12, mode="windowed", window=window)
        told: list[int] = []
        for group, grown in run(asked, seed):
            told += [node.token for node in grown.fixed]
            sure = bool(group.answers) and told == tokens_of(group.answers[0].node)
            assert group.done or sure or group.searches[0].length - len(told) <= window
        assert told == tokens_of(group.answers[0].node)
        exact = finished(random_request(random.Random(0), **_fields(asked)), seed)
        differ += tokens_of(exact.answers[0].node) != told
    assert differ, "the window never forced anything: that proves little"


def _fields(asked: Request) -> dict[str, Any]:
    assert asked.beams is not None
    beams = {name: getattr(asked.beams, name) for name in Beams.__struct_fields__}
    return beams | {
        "mode": "committed", "n": asked.n, "max_tokens": asked.max_tokens,
        "stops": asked.sampling.stops, "min_tokens": asked.sampling.min_tokens,
    }  # fmt: skip


def test_a_final_stream_says_everything_at_the_end() -> None:
    for seed in range(50):
        *before, (group, last) = run(request(stops=(1,), mode="final"), seed)
        assert not any(grown.fixed for _, grown in before)
        assert [n.token for n in last.fixed] == tokens_of(group.answers[0].node)


LETTERS = [b"a", b"b", b"\n", b"ab", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"ba", b"\xe2",
           b"\x82\xac", b"c", b" ", b"bb"]  # fmt: skip


class Bytes:
    """An incremental decoder of tokens that cut characters."""

    def __init__(self) -> None:
        self.decoder = getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, /) -> str:
        return self.decoder.decode(LETTERS[token])

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)

    def fork(self) -> "Bytes":
        twin = Bytes()
        twin.decoder.setstate(self.decoder.getstate())
        return twin


def test_streamed_text_is_the_answers_text_with_stop_strings_and_cut_characters() -> None:
    rng, stopped, pieces = random.Random(4), 0, 0
    for seed in range(1500):
        stop = rng.choice([("ab",), ("\n", "bab"), ("é", "a😀"), ("€b", "ca")])
        asked = random_request(rng, stop=stop, n=1)
        group = BeamGroup(asked, 999)
        said, speaker = "", Text(Bytes(), stop)
        texts = [Text(Bytes(), stop)]
        while not group.done:
            completes = [text.completes for text in texts]
            best_of = BANK.best(seed, group.live)
            grown = group.advance(*best_of, lambda row, token: completes[row](token))  # noqa: B023
            texts = [texts[row].fork() for row in grown.parents]
            for text, token in zip(texts, grown.tokens, strict=True):
                text.push(token)
                assert text.stopped is None, "a beam lives on behind its end"
            for node in grown.fixed:
                if node.token not in asked.sampling.stops:
                    said += speaker.push(node.token)
            pieces += bool(grown.fixed) and not group.done
        said += speaker.finish()
        best = group.answers[0]
        shown = [t for t in tokens_of(best.node) if t not in asked.sampling.stops]
        whole = b"".join(LETTERS[t] for t in shown).decode("utf-8", "replace")
        if isinstance(best.stop, str):
            stopped += 1
            assert best.stop in whole
            assert said == whole[: whole.index(best.stop)], "at the first and only place"
        else:
            assert said == whole
            assert not any(each in whole for each in stop)
    assert stopped > 150
    assert pieces > 400


# --- diverse beams ----------------------------------------------------------------------------


def diverse(
    logprobs: Callable[[list[int]], Floats], asked: Request
) -> list[tuple[list[int], float]]:
    """Vijayakumar et al. 2016 with Hamming diversity, straight from the paper, on lists."""
    beams = asked.beams
    assert beams is not None
    size, ends, one = beams.width // beams.groups, asked.sampling.stops, np.float32
    live: list[list[tuple[list[int], Any]]] = [[([], one(0))] for _ in range(beams.groups)]
    done: list[list[tuple[float, list[int]]]] = [[] for _ in range(beams.groups)]
    for length in range(1, asked.max_tokens + 1):
        said: list[int] = []
        for g in range(beams.groups):
            options = []
            for b, (tokens, total) in enumerate(live[g]):
                row = logprobs(tokens)
                for v in range(len(row)):
                    if v in ends and length <= asked.sampling.min_tokens:
                        continue
                    paid = one(beams.diversity_penalty) * one(said.count(v))
                    options.append((-((row[v] - paid) + total), b, v))
            options.sort()
            grown: list[tuple[list[int], Any]] = []
            for rank, (negative, b, v) in enumerate(options):
                tokens = [*live[g][b][0], v]
                if v in ends or length == asked.max_tokens:
                    if rank < size:
                        score = float(-negative / one(length**beams.length_penalty))
                        done[g].append((score, tokens))
                elif len(grown) < size:
                    grown.append((tokens, -negative))
            said += [tokens[-1] for tokens, _ in grown]
            done[g] = sorted(done[g], key=lambda one: -one[0])[:size]
            if live[g]:
                live[g] = grown
            if grown and len(done[g]) == size:
                far = beams.early_stopping == "never" and beams.length_penalty > 0
                reach = grown[0][1] / one(
                    (asked.max_tokens if far else length) ** beams.length_penalty
                )
                if beams.early_stopping is True or not reach > done[g][-1][0]:
                    live[g] = []
    merged = sorted((x for each in done for x in each), key=lambda x: (-x[0], len(x[1])))
    return [(tokens, score) for score, tokens in merged[: asked.n]]


def test_diverse_groups_are_the_papers() -> None:
    rng, sooner = random.Random(6), 0
    for seed in range(300):
        groups = rng.choice([2, 3, 4])
        case: dict[str, Any] = {
            "width": groups * rng.randint(1, 2),
            "n": rng.randint(1, groups),
            "groups": groups,
            "diversity_penalty": rng.choice([0.0, 0.3, 1.0, 5.0]),
        }
        state = rng.getstate()
        steps = []
        for exact_exit in (False, True):
            rng.setstate(state)
            asked = random_request(rng, **case, exact_exit=exact_exit)
            theirs = diverse(lambda tokens: BANK.logprobs[BANK.row(seed, tokens)], asked)  # noqa: B023
            *_, (group, _) = run(asked, seed)
            ours = [(tokens, score) for tokens, score, _ in plain(group.answers)]
            assert ours == theirs, (seed, asked)
            steps.append(sum(1 for _ in run(asked, seed)))
        assert steps[1] <= steps[0]
        sooner += steps[1] < steps[0]
    assert sooner > 10, "exact_exit hardly ever saved a step"


def test_groups_without_a_penalty_are_the_same_search_again() -> None:
    for seed in range(40):
        alone = finished(request(width=3, n=3, stops=(1, 2), exact_exit=False), seed)
        asked = request(width=6, n=6, groups=2, stops=(1, 2), exact_exit=False)
        twice = finished(asked, seed)
        assert plain(twice.answers) == [x for x in plain(alone.answers) for _ in range(2)]


def test_a_diversity_penalty_makes_answers_differ() -> None:
    def distinct(penalty: float) -> int:
        asked = request(width=6, n=6, groups=6, max_tokens=6, diversity_penalty=penalty)
        return sum(
            len({tuple(tokens[:2]) for tokens, *_ in plain(finished(asked, seed).answers)})
            for seed in range(30)
        )

    assert distinct(0.0) == 30
    assert distinct(1.0) < distinct(20.0) == 180


def test_log_probabilities_of_diverse_beams_are_the_models_own() -> None:
    asked = request(width=4, groups=4, n=4, diversity_penalty=3.0)
    for node in (e.node for e in finished(asked, 5).answers):
        while node.length:
            row = BANK.logprobs[BANK.row(5, tokens_of(node.parent))]
            assert node.logprob == row[node.token]
            node = node.parent


# --- drawn beams ------------------------------------------------------------------------------


def test_drawn_beams_are_transformers_given_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers draws with torch.multinomial; here that takes our noise."""
    step = 0

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        nonlocal step
        rows = probabilities.shape[1] // vocabulary
        ids = np.tile(np.arange(vocabulary, dtype=np.int32), (rows, 1))
        noise = torch.from_numpy(gumbel(seed, step, ids)).reshape(1, -1)
        step += 1
        return (probabilities.log() + noise).topk(num_samples).indices

    monkeypatch.setattr(torch, "multinomial", multinomial)
    rng = random.Random(8)
    for seed in range(60):
        model = (gpt2 if seed % 2 else llama)(seed % 4)
        vocabulary, width = model.config.vocab_size, rng.randint(2, 6)
        ends, penalty = rng.sample(range(8), rng.randint(0, 2)), rng.choice([0.0, 1.0, 2.0])
        temperature, keep = rng.choice([0.7, 1.0, 2.0]), rng.choice([0, 30])
        step = 0
        theirs = generate(
            model, PROMPT, do_sample=True, num_beams=width, num_return_sequences=width,
            max_new_tokens=6, eos_token_id=ends or None, length_penalty=penalty,
            temperature=temperature, top_k=keep, early_stopping=bool(seed % 3),
        )  # fmt: skip
        asked = request(
            width=width, n=width, max_tokens=6, stops=tuple(ends), length_penalty=penalty,
            early_stopping=bool(seed % 3), temperature=temperature, top_k=keep, seed=seed,
            sample=True, exact_exit=False,
        )  # fmt: skip
        group, after = BeamGroup(asked, vocabulary), live_after(model)
        while not group.done:
            rows = torch.stack([after((*PROMPT, *tokens_of(node))) for node in group.live])
            group.advance(*top(rows, vocabulary))
        answers = [Answer(tokens, score) for tokens, score, _ in plain(group.answers)]
        compare(answers, theirs.answers, asked)
        assert step == theirs.steps == max(e.node.length for e in group.searches[0].pool) or ends


def test_noise_is_gumbel_distributed_and_a_function_of_its_place_alone() -> None:
    tokens = np.arange(20_000, dtype=np.int32).reshape(4, 5000)
    noise = gumbel(1, 7, tokens)
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    assert (gumbel(1, 7, tokens[:, ::-1])[:, ::-1] == noise).all()
    assert (gumbel(1, 7, tokens[:2, :9]) == noise[:2, :9]).all()
    same = np.tile(tokens[0], (4, 1))
    others = [gumbel(1, 7, same)[1], gumbel(2, 7, same)[0], gumbel(1, 8, same)[0]]
    for other in [*others, gumbel(-1, 7, same)[0], gumbel(2**63, 7, same)[0]]:
        assert abs(np.corrcoef(gumbel(1, 7, same)[0], other)[0, 1]) < 0.05


def test_beams_are_drawn_without_replacement_by_their_probability() -> None:
    chances = np.array([0.5, 0.25, 0.15, 0.1])
    logprobs = np.log(chances).astype(np.float32)[None]
    tokens = np.arange(4, dtype=np.int32)[None]
    rules = replaced(BeamGroup(request(width=2, max_tokens=1), 99).rules, n=2)
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(4000):
        # At the limit, those that end at the first two ranks are the first two drawn.
        noise = gumbel(seed, 0, tokens)
        pool = advance(begin(), rules, tokens, logprobs, noise=noise).search.pool
        first, second = sorted(
            (e.node.token for e in pool), key=lambda t: -(logprobs + noise)[0, t]
        )
        counts[first, second] += 1
    expected = {
        (a, b): 4000 * chances[a] * chances[b] / (1 - chances[a])
        for a, b in permutations(range(4), 2)
    }
    observed = [counts[pair] for pair in expected]
    assert stats.chisquare(observed, list(expected.values())).pvalue > 1e-3


def test_a_greedy_draw_is_none() -> None:
    for seed in range(20):
        drawn = finished(request(sample=True, temperature=0.0, stops=(1,)), seed)
        assert plain(drawn.answers) == plain(finished(request(stops=(1,)), seed).answers)


def test_min_p_leaves_nothing_improbable_to_draw() -> None:
    for seed in range(20):
        asked = request(sample=True, temperature=3.0, min_p=0.2, seed=seed)
        for node in (e.node for e in finished(asked, seed).answers):
            while node.length:
                row = BANK.logprobs[BANK.row(seed, tokens_of(node.parent))] / np.float32(3)
                assert row[node.token] >= row.max() + np.log(0.2) - 1e-5
                node = node.parent


# --- the rest of the door and of the group ----------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sentence", "field"),
    [
        (request(width=2, n=3), "n is 3, but 2 beams", "n"),
        (request(max_tokens=0), "max_tokens is 0", "max_tokens"),
        (request(width=4, groups=3), "4 beams do not divide into 3 groups", "num_beam_groups"),
        (request(width=4, groups=2, sample=True), "cannot also be drawn", "beam_sample"),
        (request(mode="windowed"), "a window of 1 or more", "beam_stream"),
        (request(mode="windowed", window=3, groups=2), "one group", "beam_stream"),
        (request(sample=True, top_p=0.9), "leave top_p out", "top_p"),
        (request(width=8, stops=(1, 2)), "24 successors, and the vocabulary has 20", "beam_width"),
        (request(length_penalty=-50.0), "length_penalty -50.0 over 8", "length_penalty"),
    ],
)
def test_what_no_search_can_do_is_refused(asked: Request, sentence: str, field: str) -> None:
    with pytest.raises(InvalidField, match=sentence) as caught:
        BeamGroup(asked, 20)
    assert caught.value.param == field


def test_one_beam_ends_where_greedy_ends() -> None:
    for seed in range(100):
        tokens: list[int] = []
        while len(tokens) < 8 and (not tokens or tokens[-1] not in (1, 2)):
            tokens.append(int(BANK.order[BANK.row(seed, tokens), 0]))
        group = finished(request(width=1, stops=(1, 2)), seed)
        assert tokens_of(group.answers[0].node) == tokens


def test_wider_rows_than_asked_for_change_nothing() -> None:
    for seed in range(30):
        asked = request(width=3, n=3, stops=(1,))
        wide, narrow = finished(asked, seed), BeamGroup(asked, 99)
        while not narrow.done:
            tokens, logprobs = BANK.best(seed, narrow.live)
            narrow.advance(tokens[:, : narrow.candidates], logprobs[:, : narrow.candidates])
        assert plain(narrow.answers) == plain(wide.answers)


def test_where_masks_leave_no_token_the_beams_answer_as_they_stand() -> None:
    tokens, nothing = np.arange(4, dtype=np.int32)[None], np.full((1, 4), -np.inf, np.float32)
    group = BeamGroup(request(width=2), 99)
    grown = group.advance(tokens, nothing)
    assert group.done
    assert (grown.parents, grown.fixed) == ([], [])
    assert plain(group.answers) == [([], 0.0, None)]

    group = BeamGroup(request(width=2, n=2), 99)
    group.advance(tokens, np.array([[-1, -3, -5, -np.inf]], np.float32))
    grown = group.advance(tokens[[0, 0]], nothing[[0, 0]])
    assert plain(group.answers) == [([0], -1.0, None), ([1], -3.0, None)]
    assert [node.token for node in grown.fixed] == [0]
    assert grown.parents == []


# --- the tree ---------------------------------------------------------------------------------


class Watcher:
    """Rebuilds the tree from what it is told, as a page would."""

    def __init__(self) -> None:
        self.nodes: dict[int, dict[str, Any]] = {}
        self.live: list[int] = []
        self.pool: dict[int, float] = {}
        self.committed = 0
        self.stop: dict[str, Any] = {}

    def read(self, data: bytes) -> None:
        told = json.loads(data)
        if told.get("snapshot"):
            self.__init__()  # type: ignore[misc]
        for node in told["nodes"]:
            assert node["id"] not in self.nodes, "told twice"
            assert node["parent"] == 0 or node["parent"] in self.nodes
            self.nodes[node["id"]] = node
        stayed = {self.nodes[i]["parent"] for i in [n["id"] for n in told["nodes"]]}
        assert all(i in self.live and i not in stayed for i in told.get("dead", []))
        self.live = told["live"]
        for i in told.get("evicted", []):
            del self.pool[i]
        self.pool |= {ending["node"]: ending["score"] for ending in told["finished"]}
        self.committed, self.stop = told["committed"], told["stop"]

    def tokens(self, node: int) -> list[int]:
        tokens = []
        while node:
            tokens.append(self.nodes[node]["token_id"])
            node = self.nodes[node]["parent"]
        return tokens[::-1]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_tree_can_be_rebuilt_from_its_events(groups: int) -> None:
    rng, sizes = random.Random(9), []
    for seed in range(150):
        asked = random_request(
            rng, width=2 * rng.randint(1, 3), n=1, groups=groups, tree=True,
            diversity_penalty=float(groups - 1),
        )  # fmt: skip
        watcher, late = Watcher(), Watcher()
        told = 0
        for group, grown in run(asked, seed, name=lambda token: f"<{token}>"):
            told += len(grown.fixed)
            watcher.read(grown.tree)
            late.read(group.snapshot())
            sizes.append(len(grown.tree))
            for one in (watcher, late):
                assert [one.tokens(i) for i in one.live] == [tokens_of(n) for n in group.live]
                pool = [e for search in group.searches for e in search.pool]
                assert sorted(one.pool) == sorted(e.node.number for e in pool)
                assert all(one.tokens(e.node.number) == tokens_of(e.node) for e in pool)
                assert one.committed == told
                assert [one.nodes[i]["row"] for i in one.live] == list(range(len(one.live)))
            assert all(n["text"] == f"<{n['token_id']}>" for n in watcher.nodes.values())
        assert watcher.stop["reason"] in {s.stop for s in group.searches}
        assert not watcher.stop["improvable"]
    assert np.mean(sizes) < 1000, "bytes a step"


def test_the_stop_line_says_how_near_the_end_is() -> None:
    for seed in range(60):
        asked = request(stops=(1, 2), tree=True, exact_exit=False)
        for group, grown in run(asked, seed):
            stop, search = json.loads(grown.tree)["stop"], group.searches[0]
            if group.done:
                assert stop["reason"] == search.stop
            elif stop["worst_finished"] is not None:
                assert stop["attainable"] >= stop["worst_finished"], "else it had stopped"
                assert len(search.pool) == 4
            else:
                assert len(search.pool) < 4
