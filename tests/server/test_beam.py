"""The search against transformers' `generate`: random cases, then every corner by name."""

import random
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.beam import Rules, Search, advance, begin, stable
from server.engine.tree import Node, ancestor, child, meet, path, root
from tests.server.beam_oracle import (
    VOCABULARY,
    Answer,
    Prefix,
    Run,
    Scripted,
    check,
    compare,
    generate,
    gpt2,
    live_after,
    llama,
    rules_of,
    search,
    tokens_of,
    top,
)

PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]


def random_case(rng: random.Random) -> tuple[Any, list[int], dict[str, Any]]:
    width, limit = rng.randint(2, 8), rng.randint(1, 12)
    options: dict[str, Any] = {
        "num_beams": width,
        "max_new_tokens": limit,
        "num_return_sequences": rng.randint(1, width),
        "length_penalty": rng.choice(PENALTIES),
        "early_stopping": rng.choice([False, True, "never"]),
        "eos_token_id": rng.sample(range(8), rng.randint(0, 3)) or None,
    }
    if rng.random() < 0.2:
        options["min_new_tokens"] = rng.randint(1, min(4, limit))
    model = rng.choice([gpt2, llama])(rng.randrange(4))
    return model, [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 10))], options


def compare_random_cases(count: int, seed: int) -> None:
    rng, sooner = random.Random(seed), 0
    for _ in range(count):
        model, prompt, options = random_case(rng)
        sooner += check(model, prompt, **options).steps < options["max_new_tokens"]
    assert sooner > count // 12, "hardly any search stopped before its limit: that proves little"


def test_three_hundred_random_searches_are_transformers() -> None:
    compare_random_cases(300, seed=1)


@pytest.mark.slow
def test_two_thousand_random_searches_are_transformers() -> None:
    compare_random_cases(2000, seed=2)


# --- the corners ------------------------------------------------------------------------------


def scripted(seed: int, vocabulary: int = 12, **likely: float) -> Any:
    """Random logits after every prefix; t3=2.0 makes token 3 likelier by so much."""

    def script(prefix: Prefix) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *prefix)) % 2**31)
        logits = torch.randn(vocabulary, generator=generator) * 2
        for name, more in likely.items():
            logits[int(name[1:])] += more
        return logits

    return Scripted.of(script, vocabulary)


def step(
    rules: Rules, state: Search, *rows: list[tuple[int, float]], **options: Any
) -> tuple[Search, list[int]]:
    """One step from written candidates."""
    tokens = np.array([[token for token, _ in row] for row in rows], np.int32)
    logprobs = np.array([[logprob for _, logprob in row] for row in rows], np.float32)
    done = advance(state, rules, tokens, logprobs, **options)
    assert [node.token for node in done.search.live] == done.tokens
    return done.search, done.parents


def live_tokens(state: Search) -> list[list[int]]:
    return [tokens_of(node) for node in state.live]


def test_corner_01_an_end_token_in_the_prompt_means_nothing() -> None:
    run = check(gpt2(0), [5, 1, 7, 1], num_beams=3, max_new_tokens=6, eos_token_id=[1])
    assert run.steps > 1


def test_corner_02_an_end_token_is_last_or_nowhere_unless_ends_are_ignored() -> None:
    model = scripted(2, t1=1.5)
    options: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 8, "num_return_sequences": 4}
    run = check(model, [3], eos_token_id=[1], **options)
    assert any(1 in answer.tokens for answer in run.answers)
    assert all(1 not in answer.tokens[:-1] for answer in run.answers)
    ignored = check(model, [3], eos_token_id=None, **options)
    assert any(1 in answer.tokens[:-1] for answer in ignored.answers)


def test_corner_03_an_end_at_a_rank_beyond_the_width_is_dropped() -> None:
    rules = Rules(width=2, limit=9, ends=frozenset([1]))
    state, _ = step(rules, begin(), [(5, -0.1), (6, -0.2), (1, -0.3), (7, -0.4)])
    assert state.pool == ()
    assert live_tokens(state) == [[5], [6]]

    def script(prefix: Prefix) -> list[float]:
        return [0, 3, 5, 4, 2, 1] if len(prefix) == 1 else [0, 1, 6, 0.5, 3, 2.5]

    run = check(Scripted.of(script, 6), [4], num_beams=2, max_new_tokens=4, eos_token_id=[1])
    assert [answer.tokens[0] for answer in run.answers] != [1]


def test_corner_04_all_of_the_best_end_and_as_many_live() -> None:
    rules = Rules(width=2, limit=9, ends=frozenset([1, 2]))
    row = [(1, -0.1), (2, -0.2), (5, -2.0), (6, -3.0), (7, -4.0), (8, -5.0)]
    state, parents = step(rules, begin(), row)
    assert [ending.stop for ending in state.pool] == [1, 2]
    assert (live_tokens(state), parents) == ([[5], [6]], [0, 0])
    check(scripted(4, t1=9.0, t2=8.5), [3], num_beams=2, max_new_tokens=6, eos_token_id=[1, 2])


def test_corner_05_several_end_tokens_and_which_one_ended() -> None:
    assert Rules(width=4, limit=9, ends=frozenset([1, 2, 3])).candidates == 16
    assert Rules(width=4, limit=9).candidates == 8
    run = check(
        scripted(5, t1=2.0, t2=2.0), [3], num_beams=3, max_new_tokens=8, num_return_sequences=3,
        eos_token_id=[1, 2, 4], length_penalty=0.0,
    )  # fmt: skip
    state = replayed(
        run,
        [3],
        rules_of(
            {
                "num_beams": 3,
                "max_new_tokens": 8,
                "n": 3,
                "length_penalty": 0.0,
                "eos_token_id": [1, 2, 4],
            }
        ),
    )
    for ending in state.pool:
        last = ending.node.token
        assert ending.stop == (last if last in (1, 2, 4) else None)


def replayed(run: Run, prompt: list[int], rules: Rules) -> Search:
    return search(lambda prefix: run.logits[prefix].log_softmax(-1), prompt, rules)[2]


def test_corner_06_no_end_before_min_tokens_and_min_length_counts_the_prompt() -> None:
    model, prompt = scripted(6, t1=6.0), [3, 4, 5, 6, 7]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": [1]}
    new = check(model, prompt, max_new_tokens=8, min_new_tokens=4, **options)
    length = check(model, prompt, max_new_tokens=8, min_length=9, **options)
    assert new.answers == length.answers
    assert min(len(answer.tokens) for answer in new.answers) == 5
    beyond = check(model, prompt, max_new_tokens=3, min_new_tokens=3, **options)
    assert all(1 not in answer.tokens for answer in beyond.answers)


def test_corner_07_at_the_limit_everything_ends_and_competes() -> None:
    model = scripted(7, t1=-1.0)
    run = check(model, [3], num_beams=3, max_new_tokens=5, num_return_sequences=3, eos_token_id=[1])
    state = replayed(run, [3], Rules(width=3, limit=5, ends=frozenset([1]), exact_exit=False))
    assert state.stop == "all_ended"
    assert state.pool[0].stop is None, "an answer that no end token ended can win"


def test_corner_08_one_token() -> None:
    run = check(gpt2(1), [3], num_beams=4, max_new_tokens=1, num_return_sequences=4)
    assert run.steps == 1
    assert [len(answer.tokens) for answer in run.answers] == [1] * 4


def test_corner_09_max_length_counts_the_prompt() -> None:
    run = check(llama(1), [3, 4, 5], num_beams=3, max_length=9)
    assert run.answers == check(llama(1), [3, 4, 5], num_beams=3, max_new_tokens=6).answers


@pytest.mark.parametrize("penalty", [-1.5, 0.0, 0.3, 1.7, 3.0])
def test_corner_10_any_length_penalty(penalty: float) -> None:
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": [1]}
    for seed in range(4):
        model = scripted(seed, t1=1.0)
        check(model, [3], max_new_tokens=7, length_penalty=penalty, **options)


def test_corner_10_a_length_penalty_out_of_float32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"length_penalty -20\.0 over 1000 tokens leaves"):
        Rules(width=2, limit=1000, length_penalty=-20.0)


def test_corner_11_early_stopping_admits_nothing_beyond_a_full_pool() -> None:
    rules = Rules(width=2, limit=9, ends=frozenset([1, 2]), early_stopping=True)
    row = [(1, -3.0), (2, -3.5), (5, -3.6), (6, -3.7), (7, -4.0), (8, -5.0)]
    state, _ = step(rules, begin(), row)
    assert state.stop == "pool_full", "in the same step"
    run = check(
        scripted(11, t1=4.0), [3], num_beams=3, max_new_tokens=9, eos_token_id=[1],
        early_stopping=True,
    )  # fmt: skip
    assert run.steps < 9


def test_corner_12_never_is_false_unless_long_answers_are_favoured() -> None:
    steps = []
    for penalty, mode in product([-1.0, 0.0, 1.0], [False, "never"]):
        run = check(
            scripted(12, t1=3.0), [3], num_beams=2, max_new_tokens=12, eos_token_id=[1],
            length_penalty=penalty, early_stopping=mode,
        )  # fmt: skip
        steps.append(run.steps)
    assert steps[0] == steps[1]
    assert steps[2] == steps[3]
    assert steps[4] < steps[5]


def test_corner_13_what_cannot_improve_has_stopped_for_good() -> None:
    rules = Rules(width=2, limit=9, ends=frozenset([1, 2]), exact_exit=False)
    state, _ = step(
        rules, begin(), [(1, -0.1), (2, -0.2), (5, -2.0), (6, -3.0), (7, -4.0), (8, -5.0)]
    )
    assert state.stop == "not_improvable"
    with pytest.raises(ValueError, match=r"has stopped \(not_improvable\)"):
        step(rules, state, [(1, -0.1)], [(1, -0.1)])


def test_corner_14_at_most_as_many_answers_as_beams_best_first_older_first() -> None:
    with pytest.raises(ValueError, match="n is 4, but 3 beams give 1 to 3 answers"):
        Rules(width=3, limit=9, n=4)
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate(gpt2(0), [3], num_beams=3, num_return_sequences=4, max_new_tokens=3)
    run = check(llama(0), [3], num_beams=5, max_new_tokens=6, num_return_sequences=5)
    scores = [answer.score for answer in run.answers]
    assert scores == sorted(scores, reverse=True)

    rules = Rules(width=2, limit=9, ends=frozenset([1]), length_penalty=0.0, exact_exit=False)
    state, _ = step(rules, begin(), [(1, -1.0), (5, -1.0), (6, -5.0)])
    state, _ = step(rules, state, [(1, 0.0), (7, -1.0)], [(7, -1.0), (8, -1.0)])
    assert [ending.node.length for ending in state.pool] == [1, 2], "an equal score came later"


def test_corner_15_one_beam_that_stops_early_is_greedy() -> None:
    model = gpt2(3)
    for end, first in product(range(6), range(4)):
        raw = model.generate(
            torch.tensor([[first]]), max_new_tokens=8, eos_token_id=[end], pad_token_id=0,
            do_sample=False, attention_mask=torch.ones(1, 1),
        )[0, 1:].tolist()  # fmt: skip
        greedy = raw[: raw.index(end) + 1] if end in raw else raw
        rules = Rules(width=1, limit=8, ends=frozenset([end]), early_stopping=True)
        answers, _, _ = search(live_after(model), [first], rules)
        assert answers[0].tokens == greedy
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate(model, [3], num_beams=1, num_return_sequences=2, max_new_tokens=3)


def test_corner_16_sums_and_scores_are_float32() -> None:
    rules = Rules(width=2, limit=40, length_penalty=0.7, exact_exit=False)
    generator, state = np.random.default_rng(16), begin()
    total = np.float32(0)
    while state.stop is None:
        rows = [-np.sort(generator.exponential(size=4)).astype(np.float32) for _ in state.live]
        state, _ = step(rules, state, *([(i, float(x)) for i, x in enumerate(r)] for r in rows))
    for ending in state.pool:
        total = np.float32(0)
        for node in path(ending.node):
            total += np.float32(node.logprob)
            assert node.sum == total
        assert ending.score == total / np.float32(40**0.7)


def test_corner_17_exact_ties_go_to_the_smaller_row_and_then_the_smaller_token() -> None:
    rules = Rules(width=3, limit=9, exact_exit=False)
    state, _ = step(rules, begin(), [(7, -1.0), (8, -1.0), (9, -1.0), (4, -1.0)])
    assert live_tokens(state) == [[4], [7], [8]]
    state, parents = step(rules, state, *[[(2, -1.0), (1, -1.0), (3, -1.0)]] * 3)
    assert parents == [0, 0, 0]
    assert live_tokens(state) == [[4, 1], [4, 2], [4, 3]]
    # Equal only once rounded into the sum: still by token, though the row came in another order.
    deep = Search((child(root(), 1, 0, -1e6, -1e6, 1, ()),))
    state, _ = step(rules, deep, [(9, -0.001), (3, -0.002), (5, -0.003)])
    assert [node.token for node in state.live] == [3, 5, 9]


def test_corner_18_fewer_successors_than_beams() -> None:
    model = scripted(18, vocabulary=3)
    run = generate(model, [1], num_beams=4, num_return_sequences=4, max_new_tokens=1)
    assert run.answers[3].score == -1e9, "transformers fills up"
    rules = Rules(width=4, n=4, limit=1)
    answers, _, _ = search(lambda p: run.logits[p].log_softmax(-1), [1], rules)
    compare(answers, run.answers[:3], "ours gives what there is")
    longer = generate(model, [1], num_beams=4, num_return_sequences=4, max_new_tokens=5)
    rules = Rules(width=4, n=4, limit=5)
    answers, _, _ = search(lambda p: longer.logits[p].log_softmax(-1), [1], rules)
    compare(answers, longer.answers, "once there are enough, nothing is different")


def test_corner_19_masked_candidates_are_none() -> None:
    rules = Rules(width=3, limit=9, ends=frozenset([1]), exact_exit=False)
    masked = -np.inf
    state, _ = step(rules, begin(), [(5, -1.0), (6, -2.0), (1, masked), (7, masked)])
    assert live_tokens(state) == [[5], [6]]
    assert state.pool == ()
    state, parents = step(rules, state, [(5, masked)] * 2, [(4, -1.0), (3, masked)])
    assert (live_tokens(state), parents) == ([[6, 4]], [1])
    state, _ = step(rules, state, [(5, masked), (1, masked)])
    assert state.stop == "all_ended"
    assert state.pool == (), "a dead end has no answer; who asked must be told"


def test_corner_20_what_is_not_a_number_fails_this_search() -> None:
    rules = Rules(width=2, limit=9)
    with pytest.raises(ValueError, match="not a number"):
        step(rules, begin(), [(5, -1.0), (6, float("nan")), (7, -2.0)])


def test_corner_21_a_stop_string_ends_its_candidate_and_others_take_the_place() -> None:
    rules = Rules(width=2, limit=9, strings=True, exact_exit=False)
    assert rules.candidates == 4
    asked = []

    def strings(row: int, token: int) -> str | None:
        asked.append((row, token))
        return "\n\n" if token in (5, 6, 7) else None

    row = [(4, -0.1), (5, -0.2), (6, -0.3), (7, -0.4), (8, -0.5), (9, -0.6)]
    state, _ = step(rules, begin(), row, strings=strings)
    assert [(ending.node.token, ending.stop) for ending in state.pool] == [(5, "\n\n")]
    assert live_tokens(state) == [[4], [8]]
    assert asked == [(0, 4), (0, 5), (0, 6), (0, 7), (0, 8)], "no more are decoded than needed"
    state, _ = step(rules, begin(), [(5, -0.2), (6, -0.3), (7, -0.4)], strings=strings)
    assert state.stop == "all_ended"


def test_corner_22_padding_is_no_measure_of_length() -> None:
    model = scripted(22, t1=3.0)
    run = check(
        model, [3], num_beams=3, max_new_tokens=8, num_return_sequences=3, eos_token_id=[1],
        pad_token_id=0, length_penalty=0.0,
    )  # fmt: skip
    shortest = min(len(answer.tokens) for answer in run.answers)
    row = [len(answer.tokens) for answer in run.answers].index(shortest)
    assert run.raw.sequences.shape[1] > 1 + shortest
    assert run.raw.sequences[row, 1 + shortest :].unique().tolist() == [1], "padded with the end"


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}])
def test_corner_23_what_looks_back_follows_the_parents(options: dict[str, Any]) -> None:
    for seed in range(6):
        prompt, model = [seed, 9, seed], (gpt2 if seed % 2 else llama)(seed % 4)
        limits: dict[str, Any] = {
            "num_beams": 4, "max_new_tokens": 8, "num_return_sequences": 4, "eos_token_id": [2],
        }  # fmt: skip
        run = generate(model, prompt, **limits, **options)
        # Scores are kept under whole prefixes: a beam that mixed up two histories finds none.
        answers, steps, _ = search(run.scores.__getitem__, prompt, rules_of(limits))
        assert steps == run.steps
        compare(answers, run.answers, options)


def test_corner_24_two_answers_with_the_same_text_stay_two() -> None:
    text = {4: "a", 5: "b", 6: "ab"}
    rules = Rules(width=2, limit=2, n=2, ends=frozenset([1]))
    state, _ = step(rules, begin(), [(6, -1.0), (4, -1.1), (9, -8.0)])
    state, _ = step(rules, state, [(1, -0.1), (9, -9.0)], [(5, -0.1), (9, -9.0)])
    texts = ["".join(text.get(t, "") for t in tokens_of(ending.node)) for ending in state.pool]
    assert texts == ["ab", "ab"]


@torch.inference_mode()
def test_corner_25_a_padded_batch_gives_what_each_gives_alone() -> None:
    model, prompts = llama(2), [[7, 3], [5, 9, 11, 2, 30]]
    options: dict[str, Any] = {
        "num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 3, "eos_token_id": [1],
        "length_penalty": 2.0,
    }  # fmt: skip
    raw = model.generate(
        torch.tensor([[0, 0, 0, *prompts[0]], prompts[1]]),
        attention_mask=torch.tensor([[0, 0, 0, 1, 1], [1] * 5]),
        **options, do_sample=False, pad_token_id=0, output_logits=True, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    lengths = (raw.beam_indices >= 0).sum(-1).tolist()
    for i, prompt in enumerate(prompts):
        rows = range(3 * i, 3 * i + 3)
        theirs = [
            Answer(raw.sequences[r, 5 : 5 + lengths[r]].tolist(), raw.sequences_scores[r].item())
            for r in rows
        ]
        compare(search(live_after(model), prompt, rules_of(options))[0], theirs, prompt)


def test_corner_26_an_empty_prompt_is_the_begin_token() -> None:
    model = gpt2(0)
    raw = model.generate(
        bos_token_id=9, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    answers, _, _ = search(live_after(model), [9], Rules(width=3, limit=5))
    assert raw[0].tolist() == [9, *answers[0].tokens]


def test_corner_27_padded_rows_of_the_vocabulary_have_no_probability() -> None:
    narrow = scripted(27, vocabulary=10)
    wide = Scripted.of(
        lambda prefix: torch.cat([narrow.script(prefix), torch.full((6,), -torch.inf)]), 16
    )
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "num_return_sequences": 3}
    run = check(wide, [3], **options)
    compare(check(narrow, [3], **options).answers, run.answers, "padded")


def test_corner_28_each_token_has_its_log_probability_its_rank_and_its_rivals() -> None:
    model, prompt = llama(3), [4, 8]
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 3,
                               "eos_token_id": [1], "length_penalty": 0.0}  # fmt: skip
    run = generate(model, prompt, **options, repetition_penalty=1.3)
    given = model.compute_transition_scores(
        run.raw.sequences, run.raw.scores, run.raw.beam_indices, normalize_logits=False
    )
    rules = Rules(
        width=3, limit=6, n=3, ends=frozenset([1]), length_penalty=0.0, top=2, exact_exit=False
    )
    state = search(run.scores.__getitem__, prompt, rules)[2]
    for ending, row in zip(state.pool, given.tolist(), strict=True):
        nodes = path(ending.node)
        np.testing.assert_allclose(
            [node.logprob for node in nodes], row[: len(nodes)], rtol=1e-5, atol=1e-5
        )
        assert ending.node.sum == np.array([n.logprob for n in nodes], np.float32).cumsum()[-1]
        for i, node in enumerate(nodes):
            scores = run.scores[(*prompt, *(n.token for n in nodes[:i]))]
            assert node.rank == 1 + int((scores > scores[node.token]).sum())
            best = scores.topk(2)
            assert [token for token, _ in node.rivals] == best.indices.tolist()
            assert [logprob for _, logprob in node.rivals] == best.values.tolist()


# --- what is not in transformers --------------------------------------------------------------


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_answers() -> None:
    vocabulary, limit, end = 3, 4, 0
    for seed in range(20):
        rules = Rules(width=vocabulary**limit, limit=limit, ends=frozenset([end]), n=5)
        logprobs = live_after(scripted(seed, vocabulary))
        answers, _, _ = search(logprobs, [1], rules)
        scores = {}
        for tokens in product(range(vocabulary), repeat=limit):
            cut = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            total = sum(logprobs((1, *cut[:i]))[t].item() for i, t in enumerate(cut))
            scores[cut] = total / len(cut)
        best = sorted(scores, key=lambda cut: -scores[cut])[:5]
        compare(answers, [Answer(list(cut), scores[cut]) for cut in best], seed)


def test_a_step_changes_nothing_that_was_there_before() -> None:
    model, rules = gpt2(2), Rules(width=4, limit=8, ends=frozenset([1]), exact_exit=False)
    logprobs, state, states = live_after(model), begin(), []
    while state.stop is None:
        rows = torch.stack([logprobs((3, *tokens_of(node))) for node in state.live])
        states.append((state, top(rows, rules.candidates), live_tokens(state), state.pool))
        state = advance(state, rules, *states[-1][1]).search
    for (before, seen, tokens, pool), (following, *_) in pairwise(states):
        assert (live_tokens(before), before.pool) == (tokens, pool)
        again = advance(before, rules, *seen).search
        assert live_tokens(again) == live_tokens(following)


def test_a_positive_bias_takes_every_bound_away() -> None:
    row = [(1, 0.5), (5, 0.4), (6, 0.3)]
    sure = Rules(width=2, limit=9, ends=frozenset([1]))
    open_ = Rules(width=2, limit=9, ends=frozenset([1]), falling=False)
    assert (
        step(
            sure,
            begin(),
            [(t, x - 1) for t, x in row],
        )[0].stop
        is None
    )
    state, _ = step(open_, begin(), row)
    assert state.stop is None
    found = stable(open_, [state])
    assert found is not None
    assert found.length == 0, "either beam may still rise above what is finished"


def test_where_branches_part_is_found_as_by_walking() -> None:
    rng = random.Random(5)
    nodes = [root()]
    for number in range(1, 3000):
        parent = nodes[-1] if rng.random() < 0.9 else rng.choice(nodes)
        nodes.append(child(parent, number, 0, 0.0, 0.0, 1, ()))
    for _ in range(2000):
        one, other = rng.choice(nodes), rng.choice(nodes)
        trail = {id(node) for node in [nodes[0], *path(one)]}
        walked = other
        while id(walked) not in trail:
            walked = walked.parent
        assert meet(one, other) is walked
        assert meet(one, nodes[0]) is nodes[0]
        length = rng.randint(0, one.length)
        assert ancestor(one, length) is [nodes[0], *path(one)][length]


def test_a_long_path_is_freed_without_a_deep_stack() -> None:
    node: Node = root()
    for number in range(100_000):
        node = child(node, number, 0, 0.0, 0.0, 1, ())
    assert ancestor(node, 1).length == 1


def test_any_ancestor_is_a_few_hops_away() -> None:
    node, most = root(), 0
    for number in range(5000):
        node = child(node, number, 0, 0.0, 0.0, 1, ())
    for length in range(0, 5000, 7):
        at, hops = node, 0
        while at.length > length:
            at, hops = (at.jump if at.jump.length >= length else at.parent), hops + 1
        most = max(most, hops)
    assert most <= 3 * 13, "three times the logarithm"
