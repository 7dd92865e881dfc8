"""Which beam search a body asks for, in whose words it may be said."""

from typing import Any

from server.api.schema import Sampled
from server.api.served import Served
from server.engine.request import Beams
from server.errors import InvalidField, LimitExceeded

BEAMS_ONLY = (
    "length_penalty",
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
    "beam_sample",
    "exact_exit",
    "beam_stream",
)
ASKED_BY = {"use_beam_search", "beam_width", "num_beams", *BEAMS_ONLY}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "seed")


def choices(body: Sampled) -> int:
    """How many choices are returned; transformers say num_return_sequences."""
    return _one_of(body, "n", "num_return_sequences") or 1


def width(body: Sampled) -> int | None:
    """How many beams; None when it is no beam search."""
    if ASKED_BY.isdisjoint(_sent(body)):
        return None
    said = _one_of(body, "beam_width", "num_beams")
    if body.use_beam_search is False and (said or 1) > 1:
        raise InvalidField(
            "'use_beam_search' is false, but beams are asked for.", "use_beam_search"
        )
    if not body.use_beam_search and (said or 1) == 1:
        _refuse_beams_only(body)
        return None
    return said or body.best_of or choices(body)


def _one_of(body: Sampled, *names: str) -> int | None:
    """The value of fields that mean the same."""
    sent = _sent(body)
    said: dict[str, int] = {name: getattr(body, name) for name in names if name in sent}
    if not said:
        return None
    if len(set(said.values())) > 1:
        text = " and ".join(f"{name!r} is {value}" for name, value in said.items())
        raise InvalidField(f"{text}, but they mean the same.", min(said))
    return next(iter(said.values()), None)


def _sent(body: Sampled) -> set[str]:
    return body.model_fields_set  # fields that are null do not arrive here


def _refuse_beams_only(body: Sampled) -> None:
    for name in BEAMS_ONLY:
        if getattr(body, name) is not None:
            raise InvalidField(f"{name!r} needs a beam search: use_beam_search, num_beams.", name)


def beams(served: Served, body: Sampled, ends: int) -> tuple[Beams | None, list[str]]:
    """The search, and warnings of what is of no effect in it."""
    wide = width(body)
    if wide is None:
        return None, []
    _check(served, body, wide, ends)
    warnings = [] if body.beam_sample else _of_no_effect(body)
    if wide == 1:
        return None, warnings  # as transformers: greedy, without scores
    stream = body.beam_stream
    named: dict[str, Any] = {
        "length_penalty": body.length_penalty,
        "early_stopping": body.early_stopping,
        "groups": body.num_beam_groups,
        "diversity_penalty": body.diversity_penalty,
        "sample": body.beam_sample,
        "exact_exit": body.exact_exit,
        "mode": stream and stream.mode,
        "window": stream.w if stream and stream.mode == "windowed" else None,
        "tree": stream and stream.events == "tree",
    }
    return Beams(width=wide, **{k: v for k, v in named.items() if v is not None}), warnings


def _check(served: Served, body: Sampled, wide: int, ends: int) -> None:
    if wide > served.limits.beam_width:
        most = served.limits.beam_width
        raise LimitExceeded(
            f"{wide} beams are asked for, but the most here is {most}.", "beam_width"
        )
    if choices(body) > wide:
        raise InvalidField(f"'n' is {choices(body)}, but there are only {wide} beams.", "n")
    if body.best_of is not None and body.best_of != wide:
        raise InvalidField(f"'best_of' is {body.best_of}, but there are {wide} beams.", "best_of")
    if wide * max(2, 1 + ends) > served.vocabulary:
        raise InvalidField(f"{wide} beams are too many for so small a vocabulary.", "beam_width")
    if wide % (body.num_beam_groups or 1):
        groups = body.num_beam_groups
        raise InvalidField(f"{wide} beams cannot be {groups} equal groups.", "num_beam_groups")


def _of_no_effect(body: Sampled) -> list[str]:
    """Beams are not drawn: what shapes a draw is refused when strict, and else warned of."""
    idle = [name for name in SAMPLING if name in _sent(body)]
    warnings = [f"{name!r} has no effect in a beam search." for name in idle]
    if body.strict and idle:
        raise InvalidField(warnings[0], idle[0])
    return warnings
