"""A request's body: read under its cap, and decoded as strictly as JSON is written.

Python's own decoder takes NaN, keys twice, UTF-16 and half a surrogate pair. Whoever sends these
gets a sentence instead of a surprise. Bodies above 64 kB are decoded off the event loop.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from server.api.head import header
from server.api.work import LARGE, Pool
from server.config import Limits
from server.errors import BodyTooLarge, Cancelled, MalformedBody, WrongMediaType

Read = TypeVar("Read")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
SHOWN = 80  # characters of a client's words in an error


async def load(
    request: Request,
    limits: Limits,
    pool: Pool,
    then: Callable[[dict[str, Any]], Read],
    slow: bool = False,
) -> Read:
    """`then` of the body's object; both off the loop when the body is large, or `then` slow."""
    check_media_type(request)
    raw = await read(request, limits.body_bytes)
    return await pool.run(
        LARGE if slow else len(raw), partial(_decode_then, raw, limits.json_depth, then)
    )


def _decode_then(raw: bytes, depth: int, then: Callable[[dict[str, Any]], Read]) -> Read:
    return then(decode(raw, depth))


def check_media_type(request: Request) -> None:
    """JSON in UTF-8, not packed. This also keeps other sites' forms away from a local server."""
    said = header(request.scope, b"content-type")
    media, _, rest = said.partition(";")
    charset = rest.partition("charset=")[2].strip(' "').lower()
    if media.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        wrong = f"The body's Content-Type is {said[:SHOWN] or 'nothing'!r}"
        raise WrongMediaType(f"{wrong}; send application/json, in UTF-8.")
    packed = header(request.scope, b"content-encoding") or "identity"
    if packed.lower() != "identity":
        raise WrongMediaType(f"Content-Encoding {packed[:SHOWN]!r} is not taken; send it unpacked.")


async def read(request: Request, most: int) -> bytes:
    told = header(request.scope, b"content-length")
    if told.isdecimal() and int(told) > most:
        raise _too_large(most)
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("The client closed the connection.")
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    return bytes(body)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {most} bytes, the most that this server takes.")


def decode(raw: bytes, depth: int) -> dict[str, Any]:
    """The object that a body holds."""
    try:
        body = _STRICT.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not UTF-8: byte {error.start} is wrong.") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"The body is not JSON: {error.msg.removesuffix(' starting at')}"
            f" at character {error.pos}."
        ) from None
    except RecursionError:
        raise _too_deep(depth) from None
    except ValueError:
        raise MalformedBody("The body has a number with too many digits.") from None
    if not isinstance(body, dict):
        raise MalformedBody("The body must be a JSON object: {…}.")
    _check_depth(body, depth)
    if SURROGATE.search(raw):
        _check_surrogates(body)
    return body


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedBody(f"The key {twice[:SHOWN]!r} stands twice in one object.")
    return made


def _no_number(word: str) -> NoReturn:
    raise MalformedBody(f"{word} is not a JSON number.")


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise MalformedBody(f"The number {text[:SHOWN]} is too large.")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def _check_depth(body: Any, most: int) -> None:
    level = [body]
    for _ in range(most):
        inner = (box.values() if isinstance(box, dict) else box for box in level)
        level = [item for box in inner for item in box if isinstance(item, dict | list)]
        if not level:
            return
    raise _too_deep(most)


def _too_deep(most: int) -> MalformedBody:
    return MalformedBody(f"The body is nested deeper than {most} levels.")


def _check_surrogates(body: Any) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MalformedBody("A string has half a surrogate pair (\\ud800 … \\udfff).") from None
