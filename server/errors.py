"""Everything that can go wrong for a request, as one tree. Status and code live on the class.

KvistError
├── Refused            400  what is asked cannot be served as asked
│   ├── TooLong        400  longer than the context, or than the page pool can ever hold
│   └── Duplicate      400  a live request has this id
├── Busy               429  try again later
│   └── QueueFull      429  too many requests, or too many of their tokens, wait already
├── Unavailable        503  the engine is not there
│   ├── EngineDown     503  it died, is starting, or gave up
│   └── QueueTimeout   503  waited longer than it was willing to for its first step
├── DeadlineExceeded   504  not finished in time
├── SlowClient         499  its output was not read
└── Failed             500  our fault
    ├── StepFailed     500  a step with this request raised, twice
    └── NumericalError 500  the network answered with something that is not a number

An error that ends a running request crosses the process boundary as an event's `error` (the
sentence) and `code` (the word); `from_code` makes the exception of it again.
"""


class KvistError(Exception):
    """A sentence for the person who asked: the value, what was expected, what to do."""

    status = 500
    code = "internal_error"
    kind = "server_error"  # OpenAI's `type`

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        cut = message[: MESSAGE_LIMIT - 1] + "…"
        self.message = message if len(message) <= MESSAGE_LIMIT else cut
        self.param = param


class Refused(KvistError):
    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class TooLong(Refused):
    code = "context_length_exceeded"


class Duplicate(Refused):
    code = "duplicate_id"


class Busy(KvistError):
    status = 429
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"


class QueueFull(Busy):
    code = "queue_full"


class Unavailable(KvistError):
    status = 503
    code = "unavailable"


class EngineDown(Unavailable):
    code = "engine_down"


class QueueTimeout(Unavailable):
    code = "queue_timeout"


class DeadlineExceeded(KvistError):
    status = 504
    code = "deadline_exceeded"


class SlowClient(KvistError):
    status = 499
    code = "slow_client"


class Failed(KvistError):
    code = "failed"


class StepFailed(Failed):
    code = "step_failed"


class NumericalError(Failed):
    code = "numerical_error"


def _tree(root: type[KvistError]) -> dict[str, type[KvistError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_code(code: str | None, message: str) -> KvistError:
    """The error that an event's `code` and `error` stand for."""
    return _tree(KvistError).get(code or "", KvistError)(message)
