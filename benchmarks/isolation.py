"""What a request gets beside hostile neighbours, against what it gets alone (G11).

    python -m benchmarks.isolation [MODEL] [--victims 16] [--tokens 48] [--dtype float32]

Victims of every kind (greedy, drawn, penalised, several choices, beams) are first served one at a
time in an engine with room for all. Then the same beside one kind of neighbour after another, in
an engine with few pages and small steps: neighbours begin as the victims do, are cancelled half
way, go first, take all the pages. No text may differ, and no log-probability by more than 1e-3
(0.05 in 16 bits). The exit status is 1 when one does.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from benchmarks import harness
from model.sampling import Sampling
from server import Engine
from server.engine.fold import join
from server.engine.request import Beams, Choice, Event, Request

GOAL = {"float32": 1e-3}  # of a log-probability's difference
SIXTEEN_BITS = 0.05
CROWD, EACH = 16, 12  # neighbours at once; and in all, for each victim
CANCELLED = 0.01  # the share of them that leaves at each step
LONG, SHORT = 0.6, 24  # a long prompt's share of the context; tokens of a short one

VICTIMS: list[dict[str, Any]] = [
    {"sampling": Sampling(temperature=0)},
    {"sampling": Sampling(temperature=0), "prompt_logprobs": 2},
    {"sampling": Sampling(temperature=0.8, seed=7), "logprobs": 5},
    {"sampling": Sampling(temperature=1.2, top_k=40, top_p=0.9, seed=8), "n": 3},
    {"sampling": Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=9)},
    {"sampling": Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.5)},
    {"sampling": Sampling(temperature=0), "beams": Beams(width=4), "n": 2},
]


class Texts:
    """Prompts of this repository's own source, as ids of the model."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.rng = Random(seed)
        self.vocabulary = engine.parts.ready.config.vocabulary
        self.context = engine.parts.ready.context
        sources = sorted(Path(__file__).parents[1].glob("*/*.py"))
        text = "".join(source.read_text() for source in sources[:12])
        self.ids = engine.parts.tokenizer.encode(text)

    def some(self, length: int) -> list[int]:
        first = self.rng.randrange(len(self.ids) - length)
        return self.ids[first : first + length]

    def beginning_of(self, victims: list[Request]) -> list[int]:
        """As one of the victims begins, and then otherwise, anywhere within a page."""
        prompt = self.rng.choice(victims).prompt
        return prompt[: self.rng.randrange(1, len(prompt))] + self.some(
            self.rng.randrange(1, SHORT)
        )


Kind = Callable[[Texts, list[Request]], dict[str, Any]]


def short(texts: Texts, victims: list[Request]) -> dict[str, Any]:  # noqa: ARG001
    return {"prompt": texts.some(SHORT), "max_tokens": 16}


def same_beginnings(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    salt = texts.rng.choice(["", "", "other"])
    return {"prompt": texts.beginning_of(victims), "max_tokens": 24, "cache_salt": salt}


def the_same(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    """A victim's own request, with another seed."""
    twin = texts.rng.choice(victims)
    return {"prompt": twin.prompt, "max_tokens": 24, "sampling": Sampling(seed=1), "n": 2}


def long(texts: Texts, victims: list[Request]) -> dict[str, Any]:  # noqa: ARG001
    return {"prompt": texts.some(int(texts.context * LONG)), "max_tokens": 4}


def first(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    """Before the victims, and with their pages."""
    return same_beginnings(texts, victims) | {"max_tokens": 96, "priority": -9}


def beams(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    width = texts.rng.choice([2, 5, 8])
    search = Beams(width=width, sample=texts.rng.random() < 0.3, length_penalty=-1.0)
    return same_beginnings(texts, victims) | {"beams": search, "n": width}


def odd(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    """Everything at its ends."""
    token = texts.rng.randrange(texts.vocabulary)
    ends: list[dict[str, Any]] = [
        {"temperature": 2.0, "top_p": 1e-6}, {"temperature": 1e-6}, {"top_k": 1, "min_p": 1.0},
        {"logit_bias": {token: 100.0}}, {"logit_bias": {token: -100.0}, "typical_p": 0.01},
        {"allowed": (token,)}, {"bad_words": ((token,), (token, token))},
        {"repetition_penalty": 10.0}, {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"min_tokens": 8, "stops": tuple(range(min(64, texts.vocabulary)))},
    ]  # fmt: skip
    sampling = Sampling(seed=token, **texts.rng.choice(ends))
    return same_beginnings(texts, victims) | {"sampling": sampling, "logprobs": 20}


def many(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    return same_beginnings(texts, victims) | {"n": 6, "prompt_logprobs": 3}


KINDS: dict[str, Kind] = {
    "short": short,
    "same beginnings": same_beginnings,
    "the same": the_same,
    "long": long,
    "go first": first,
    "beams": beams,
    "odd sampling": odd,
    "many choices": many,
}


def any_kind(texts: Texts, victims: list[Request]) -> dict[str, Any]:
    return texts.rng.choice(list(KINDS.values()))(texts, victims)


def crowded(
    engine: Engine, victims: list[Request], kind: Kind | None, texts: Texts
) -> dict[str, Event]:
    """What each victim is told; without neighbours, one after the other."""
    said: dict[str, Event] = {}
    there: set[str] = set()
    numbers, left = iter(range(EACH * len(victims) if kind else 0)), list(victims)
    with tqdm(total=len(victims), unit="victim", disable=None, leave=False) as bar:
        while left or not engine.idle:
            if left and (engine.idle or (kind and texts.rng.random() < 0.3)):
                engine.submit(left.pop(0))
            while kind and len(there) < CROWD and (number := next(numbers, None)) is not None:
                made = Request(id=f"neighbour-{number}", **kind(texts, victims))
                engine.submit(made)
                there.add(made.id)
            _leave(engine, {id for id in sorted(there) if texts.rng.random() < CANCELLED})
            for event in engine.step():
                there -= {event.id} if event.done else set()
                if not event.id.startswith("neighbour"):
                    said[event.id] = join(said[event.id], event) if event.id in said else event
                    bar.update(event.done)
    engine.scheduler.check()
    return said


def _leave(engine: Engine, ids: Iterable[str]) -> None:
    for id in ids:
        engine.cancel(id)


def differences(said: dict[str, Event], alone: dict[str, Event]) -> tuple[int, float]:
    """Victims with another text, or none; and the largest difference of a log-probability."""
    texts, most = 0, 0.0
    for id, expected in alone.items():
        pairs = list(zip(_choices(said[id]), _choices(expected), strict=False))
        same = not said[id].error and len(pairs) == len(expected.choices)
        texts += not (same and all(_words(one) == _words(other) for one, other in pairs))
        for one, other in pairs:
            most = max(most, *map(_apart, _numbers(one), _numbers(other)), 0.0)
        prompts = zip(said[id].prompt_logprobs, expected.prompt_logprobs, strict=False)
        most = max(most, *[abs(mine[0] - its[0]) for mine, its in prompts if mine and its], 0.0)
    return texts, most


def _choices(event: Event) -> list[Choice]:
    return sorted(event.choices, key=lambda choice: choice.index)


def _words(choice: Choice) -> tuple[Any, ...]:
    return choice.text, choice.tokens, choice.finish, choice.stop


def _numbers(choice: Choice) -> list[float]:
    return [*choice.logprobs, choice.score or 0.0, choice.cumulative_logprob or 0.0]


def _apart(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other)


def victims_of(texts: Texts, asked: Namespace) -> list[Request]:
    return [
        Request(
            id=str(i),
            prompt=texts.some(texts.rng.randrange(8, 90)),
            max_tokens=asked.tokens,
            **{"logprobs": 2} | VICTIMS[i % len(VICTIMS)],
        )
        for i in range(asked.victims)
    ]


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("model", nargs="?", help="nothing: the embedded one")
    parser.add_argument("--victims", type=int, default=2 * len(VICTIMS))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "all"], default=[*KINDS, "all"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    how = {name: getattr(asked, name) for name in ("dtype", "device", "threads")}
    how["queue_factor"] = 1000.0  # nobody is refused
    wide = Engine(asked.model, prefix_cache=False, rows=16, **how)
    texts = Texts(wide, asked.seed)
    victims = victims_of(texts, asked)
    alone = crowded(wide, victims, None, texts)
    assert not [event.error for event in alone.values() if event.error]
    narrow = Engine(asked.model, pages=narrow_pages(texts), rows=24, step_tokens=64, **how)
    rows = []
    for name in asked.only:
        before, hits = narrow.stats.preemptions, narrow.stats.cache_hits
        before_cancelled = narrow.stats.finished.get("cancelled", 0)
        said = crowded(narrow, victims, KINDS.get(name, any_kind), texts)
        wrong, most = differences(said, alone)
        rows.append({
            "neighbours": name, "victims": len(victims), "texts differ": wrong,
            "logprobs differ by": most,
            "preemptions": narrow.stats.preemptions - before,
            "cancelled": narrow.stats.finished.get("cancelled", 0) - before_cancelled,
            "tokens found": narrow.stats.cache_hits - hits,
        })  # fmt: skip
    goal = GOAL.get(asked.dtype, SIXTEEN_BITS)
    missed = any(row["texts differ"] or row["logprobs differ by"] > goal for row in rows)
    harness.finish("isolation", rows, asked, dtype=asked.dtype, goal=goal, met=not missed)
    return int(missed)


def narrow_pages(texts: Texts) -> int:
    """Hardly more than a long prompt takes, or a search of eight beams."""
    return max(40, int(texts.context * LONG * 1.2) // 16)


if __name__ == "__main__":
    sys.exit(main())
