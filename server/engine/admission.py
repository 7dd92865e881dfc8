"""The door: what can never be served is refused here, with the reason, and never later."""

from dataclasses import dataclass

from server.engine.request import Request
from server.errors import InvalidField, LimitExceeded, TooLong


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the scheduler goes about it."""

    seats: int = 256  # branches that run at once
    budget: int = 2048  # tokens a step
    chunk: int = 512  # of one prompt in a step, while others want to run too; 0: no bound
    ahead: int = 0  # steps launched before the one in flight was read: 0 or 1
    queue: int = 1024  # requests that may wait
    queue_tokens: int = 0  # and tokens that they stand for; 0: four times the pages
    draft: int = 0  # tokens guessed ahead, for requests that do not say
    aging: float = 30.0  # seconds of waiting that outweigh one step of priority
    context: int = 0  # the most tokens of prompt and output; 0: as the pages allow
    vocabulary: int = 0  # ids are below it; 0: not checked

    def __post_init__(self) -> None:
        for name in ("seats", "budget", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.ahead not in (0, 1):
            raise ValueError(f"ahead is {self.ahead}: at most one step can be launched ahead")


def footprint(request: Request, size: int) -> int:
    """The most pages it can hold: the prompt's full ones once, and each branch's own tail."""
    tokens = len(request.prompt) + max(request.max_tokens, 1) - 1  # the last one is never fed
    full, most = len(request.prompt) // size, -(-tokens // size)
    return full + _width(request) * (most - full) if request.max_tokens > 1 else most


def _width(request: Request) -> int:
    return request.beams.width if request.beams else request.n


def check(request: Request, options: Options, pages: int, size: int) -> None:
    """Raise Refused if it could not be served by an empty engine."""
    prompt, most, width = request.prompt, request.max_tokens, _width(request)
    if not prompt:
        raise InvalidField("The prompt has no tokens: give at least one.", "prompt")
    if options.vocabulary and not 0 <= min(prompt) <= max(prompt) < options.vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < options.vocabulary)
        raise InvalidField(
            f"The prompt has the token id {wrong}: ids are 0 to {options.vocabulary - 1}.", "prompt"
        )
    if most < 0 or request.n < 1:
        raise InvalidField(f"max_tokens is {most} and n is {request.n}: 0 and 1 are the least.")
    if options.context and len(prompt) + most > options.context:
        raise TooLong(
            f"This model's maximum context length is {options.context} tokens, but {len(prompt)}"
            f" of the prompt and {most} of max_tokens make {len(prompt) + most}: ask for less.",
            "prompt",
        )
    room = min(options.seats, options.budget) if request.beams else options.seats
    if width > room:
        raise LimitExceeded(f"{width} branches are asked for, but {room} is the most at once.", "n")
    need = footprint(request, size)
    if need > pages:
        raise TooLong(
            f"A prompt of {len(prompt)} tokens and {width} × {most} new ones can need {need} pages"
            f" of {size} tokens, but there are {pages}: ask for less.",
            "prompt",
        )
