"""A run as data: knobs and a list of operations, all decided by a seed before anything happens.

An operation names requests by number and does nothing when there is no such request, so that any
part of a script is a script: a failing one can be shrunk.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from model.sampling import Sampling
from server.engine.admission import Options
from server.engine.request import Beams, Request
from tests.server.simulation.executor import VOCABULARY
from tests.server.simulation.words import END, STOPS


@dataclass(frozen=True)
class Knobs:
    """What stays the same through a run."""

    seed: int
    pages: int
    size: int
    caching: bool
    shuffled: bool  # eviction picks any cached page
    options: Options
    unread: int  # events that a reader may lag behind
    wire: bool  # messages are encoded and decoded
    long: bool  # prompts of thousands of tokens
    tight: bool  # short prompts with long answers, which outgrow the pages together
    priorities: bool
    faults: bool


@dataclass(frozen=True)
class Op:
    name: str
    number: int = 0  # of a request, or how often
    request: Request | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        shown = [f"{self.name!r}"]
        shown += [f"number={self.number}"] if self.number else []
        shown += [f"seconds={self.seconds:.3f}"] if self.seconds else []
        shown += [f"request={_short(self.request)}"] if self.request else []
        return f"Op({', '.join(shown)})"


def _short(request: Request) -> str:
    """Only what is not the default."""
    return repr({k: v for k, v in _fields(request).items() if v != _fields(PLAIN).get(k)})


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


IDS = range(VOCABULARY)
PLAIN = Request(id="", prompt=[], max_tokens=0)


def knobs(seed: int) -> Knobs:
    rng = Random(seed)
    long, tight = rng.random() < 0.02, rng.random() < 0.85
    pages = rng.choice((4, 6, 8, 12, 16, 16, 24, 24, 32, 48, 64, 128) if not tight else (24, 32))
    seats = rng.choice((1, 2, 4, 8, 8, 16, 16, 32, 256) if not tight else (8, 16, 32))
    options = Options(
        seats=seats,
        budget=2048 if long else rng.choice((1, 2, 5, 8, 16, 64, 8192)[4 * tight :]),
        chunk=rng.choice((0, 0, 1, 3, 7, 16, 64)) if not long else 512,
        ahead=rng.choice((0, 1)),
        queue=rng.choice((2, 8, 64, 1024)),
        queue_tokens=rng.choice((0, 0, 1 << 20)),
        draft=rng.choice((0, 0, 0, 2, 5)),
        vocabulary=VOCABULARY,
    )
    return Knobs(
        seed=seed,
        pages=4096 if long else pages,
        size=16 if long else rng.choice((1, 2, 4, 16)[: 4 - 2 * tight]),
        caching=rng.random() < 0.75,
        shuffled=rng.random() < 0.25,
        options=options,
        unread=rng.choice((4, 256)),
        wire=rng.random() < 0.2,
        long=long,
        tight=tight and not long,
        priorities=rng.random() < 0.3,
        faults=rng.random() < 0.4,
    )


def script(knobs: Knobs, length: int) -> list[Op]:
    rng = Random(knobs.seed ^ 0x5EED)
    room = knobs.pages * knobs.size
    trunk = rng.choices(IDS, k=4000 if knobs.long else 6 if knobs.tight else min(48, room // 2))
    names = ["submit", "step", "cancel", "disconnect", "read", "reset", "tick", "duplicate", "wall"]
    weights = [rng.uniform(10, 40), rng.uniform(30, 60), rng.uniform(0, 60), 22, 5, 0.5, 3, 1, 0.5]
    if knobs.tight:
        weights[:3] = rng.uniform(35, 55), rng.uniform(70, 100), rng.uniform(20, 50)
    if knobs.faults:
        names += ["launch", "wait", "nan", "die"]
        weights += [0.7, 0.7, 1, 0.3]
    if knobs.long:
        weights[0] = 5
    made = 0
    ops = []
    for name in rng.choices(names, weights, k=length):
        if name == "submit":
            ops.append(Op(name, made, _request(rng, knobs, trunk, made)))
            made += 1
        elif name == "step":
            ops.append(Op(name, rng.choice((1, 1, 1, 2, 5))))
        elif name == "tick":
            ops.append(Op(name, seconds=rng.choice((0.01, 0.5, 3.0, 40.0))))
        elif name == "wall":
            ops.append(Op(name, seconds=rng.choice((-3600.0, 3600.0))))
        elif name == "nan":
            ops.append(Op(name, rng.randrange(8)))
        else:  # about a request; sometimes one that is still to come
            ops.append(Op(name, max(0, made - 6 + rng.randrange(8))))
    return ops


def _request(rng: Random, knobs: Knobs, trunk: list[int], number: int) -> Request:
    shared = rng.randrange(len(trunk)) if rng.random() < 0.7 else 0
    own = rng.choice((0, 1, 1, 2, 5, 9)) if shared else 1 + rng.randrange(4 if knobs.tight else 24)
    prompt = trunk[:shared] + rng.choices(IDS, k=own)
    kind = rng.random()
    beams = _beams(rng) if kind < 0.12 else None
    lengths = (16, 24, 32) if knobs.tight else (0, 1, 2, 5, 8, 13, 20, 40)
    most = min(rng.choice(lengths), knobs.pages * knobs.size // 2)
    return Request(
        id=f"r{number}",
        prompt=prompt,
        max_tokens=max(most, 1) if beams else most,
        sampling=_sampling(rng, beams is not None),
        n=rng.randint(1, beams.width) if beams else 1 if kind < 0.8 else rng.choice((2, 3, 8)),
        beams=beams,
        stop=tuple(rng.sample(STOPS, rng.randint(1, 3))) if rng.random() < 0.25 else (),
        eos=(END,) if rng.random() < 0.5 else (),
        include_stop=rng.random() < 0.3,
        logprobs=rng.choice((None, None, None, 0, 2)),
        prompt_logprobs=rng.choice((None, None, None, None, 0, 2)),
        draft=rng.choice((None, None, None, 0, 3)),
        priority=rng.choice((-1, 0, 0, 1)) if knobs.priorities else 0,
        deadline=rng.choice((None, None, None, None, 2.0, 30.0)),
        queue_timeout=rng.choice((None, None, None, None, 1.0)),
        cache_salt=rng.choice(("", "", "", "other")),
    )


def _sampling(rng: Random, beams: bool) -> Sampling:
    stops = (END, *rng.sample(range(VOCABULARY), rng.choice((0, 0, 3)) if not beams else 0))
    return Sampling(
        temperature=rng.choice((0.0, 1.0)) if not beams else 0.0,
        seed=rng.randrange(4),
        stops=stops if rng.random() < 0.6 else (),
        min_tokens=rng.choice((0, 0, 3)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.3)),
    )


def _beams(rng: Random) -> Beams:
    width = rng.choice((2, 2, 3, 4, 8))
    return Beams(
        width=width,
        length_penalty=rng.choice((0.0, 1.0, 2.0)),
        early_stopping=rng.choice((False, True, "never")),
        exact_exit=rng.random() < 0.5,
        mode=rng.choice(("committed", "committed", "final")),
        tree=rng.random() < 0.2,
    )
