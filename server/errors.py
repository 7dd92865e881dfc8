"""Everything that can go wrong, as one tree; what the wire says of it lives on the class.

    KvistError                      500 internal_error
    ├── Refused                     400 invalid_request         the client can mend it
    │   ├── MalformedBody           400 invalid_json            not JSON as we take it
    │   ├── MissingField            400 missing_required_parameter
    │   ├── InvalidField            400 invalid_value
    │   ├── UnknownField            400 unknown_parameter
    │   ├── UnsupportedField        400 unsupported_parameter   known, and not served (yet)
    │   ├── LimitExceeded           400 limit_exceeded          above a cap of `Limits`
    │   ├── TooLong                 400 context_length_exceeded or than the pages ever hold
    │   ├── Duplicate               400 duplicate_id            a live request has this id
    │   ├── BadMessage              400 bad_http_message        two lengths, a bare CR, …
    │   ├── InvalidKey              401 invalid_api_key
    │   ├── NotFound                404 not_found
    │   │   └── ModelNotFound       404 model_not_found
    │   ├── WrongMethod             405 method_not_allowed
    │   ├── TooSlow                 408 request_timeout         the body did not come in time
    │   ├── BodyTooLarge            413 body_too_large
    │   ├── UrlTooLong              414 url_too_long
    │   ├── WrongMediaType          415 unsupported_media_type
    │   ├── WrongHost               421 wrong_host
    │   └── HeadersTooLarge         431 headers_too_large
    ├── Busy                        429 rate_limit_exceeded     with Retry-After
    │   └── QueueFull               429 queue_full              too many wait already
    ├── Cancelled                   499 cancelled               nobody is there to read it
    │   └── SlowClient              499 slow_client             its output was not read
    ├── Failed                      500 failed                  our fault
    │   ├── StepFailed              500 step_failed             a step with it raised, twice
    │   └── NumericalError          500 numerical_error         the logits were not numbers
    ├── Unavailable                 503 unavailable             with Retry-After
    │   ├── EngineDown              503 engine_down             it died, is starting, or gave up
    │   ├── Draining                503 draining                the server is stopping
    │   ├── OutOfMemory             503 out_of_memory
    │   └── QueueTimeout            503 queue_timeout           waited too long for a first step
    ├── DeadlineExceeded            504 deadline_exceeded       not finished in time
    └── StartError                  never on the wire: the server does not come up
        ├── SettingError            a flag, a variable, a line of the settings file
        ├── PortTaken               said before the weights load
        └── ModelError              the folder does not hold a model that we can serve

An error that ends a running request crosses the process boundary as an event's `error` (the
sentence) and `code` (the word); `from_code` makes the exception of it again.
"""

from typing import Any, ClassVar

MESSAGE_LIMIT = 4096  # characters; a client's own words are quoted, and can be long


class KvistError(Exception):
    """A sentence for the person who asked: the value, what was expected, what to do."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"  # OpenAI's `type`
    retry_after: ClassVar[int | None] = None  # seconds

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        cut = message[: MESSAGE_LIMIT - 1] + "…"
        self.message = message if len(message) <= MESSAGE_LIMIT else cut
        self.param = param

    def body(self) -> dict[str, Any]:
        said = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": said}


class Refused(KvistError):
    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class MalformedBody(Refused):
    code = "invalid_json"


class MissingField(Refused):
    code = "missing_required_parameter"


class InvalidField(Refused):
    code = "invalid_value"


class UnknownField(Refused):
    code = "unknown_parameter"


class UnsupportedField(Refused):
    code = "unsupported_parameter"


class LimitExceeded(Refused):
    code = "limit_exceeded"


class TooLong(Refused):
    code = "context_length_exceeded"


class Duplicate(Refused):
    code = "duplicate_id"


class BadMessage(Refused):
    code = "bad_http_message"


class InvalidKey(Refused):
    status = 401
    code = "invalid_api_key"


class NotFound(Refused):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class WrongMethod(Refused):
    status = 405
    code = "method_not_allowed"


class TooSlow(Refused):
    status = 408
    code = "request_timeout"


class BodyTooLarge(Refused):
    status = 413
    code = "body_too_large"


class UrlTooLong(Refused):
    status = 414
    code = "url_too_long"


class WrongMediaType(Refused):
    status = 415
    code = "unsupported_media_type"


class WrongHost(Refused):
    status = 421
    code = "wrong_host"


class HeadersTooLarge(Refused):
    status = 431
    code = "headers_too_large"


class Busy(KvistError):
    status = 429
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"
    retry_after = 1


class QueueFull(Busy):
    code = "queue_full"


class Cancelled(KvistError):
    status = 499
    code = "cancelled"


class SlowClient(Cancelled):
    code = "slow_client"


class Failed(KvistError):
    code = "failed"


class StepFailed(Failed):
    code = "step_failed"


class NumericalError(Failed):
    code = "numerical_error"


class Unavailable(KvistError):
    status = 503
    code = "unavailable"
    retry_after = 2


class EngineDown(Unavailable):
    code = "engine_down"


class Draining(Unavailable):
    code = "draining"


class OutOfMemory(Unavailable):
    code = "out_of_memory"


class QueueTimeout(Unavailable):
    code = "queue_timeout"


class DeadlineExceeded(KvistError):
    status = 504
    code = "deadline_exceeded"


class StartError(KvistError):
    code = "start_error"


class SettingError(StartError):
    code = "setting_error"


class PortTaken(StartError):
    code = "port_taken"


class ModelError(StartError):
    code = "model_error"


def family(root: type[KvistError] = KvistError) -> list[type[KvistError]]:
    """The class and everything below it, parents first."""
    return [root, *(below for child in root.__subclasses__() for below in family(child))]


BY_CODE = {kind.code: kind for kind in family()}


def from_code(code: str | None, message: str) -> KvistError:
    """The error that an event's `code` and `error` stand for."""
    return BY_CODE.get(code or "", Failed)(message)
