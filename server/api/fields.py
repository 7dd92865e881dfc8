"""Checks of single fields, and `parse`: a decoded body becomes a checked one, or an error of ours.

The library's own words never leave the server: every failure is said in a sentence of this file
that names the field, the value and what was expected.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from server.config import Limits
from server.errors import (
    InvalidField,
    KvistError,
    LimitExceeded,
    MissingField,
    UnknownField,
    UnsupportedField,
)

Value = TypeVar("Value")
Body = TypeVar("Body", bound=BaseModel)
SHOWN = 60  # characters of a client's value in an error
WARNED = 16  # most warnings of a response
NotServed = dict[str, tuple[tuple[Any, ...], str]]  # name: values that ask for nothing, why not


@dataclass(frozen=True)
class Bounds:
    """What the values of a body are held against."""

    limits: Limits
    vocabulary: int


def _bounds(info: ValidationInfo) -> Bounds:
    assert isinstance(info.context, Bounds)
    return info.context


def show(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | dict) else type(value).__name__
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def at_most(name: str) -> Callable[[int, ValidationInfo], int]:
    """The cap of `Limits` with this name, on a number."""

    def check(value: int, info: ValidationInfo) -> int:
        _within(name, value, f"is {show(value)}", info)
        return value

    return check


def no_more(name: str) -> Callable[[Value, ValidationInfo], Value]:
    """The same on a length, of whatever is not known to be a list yet."""

    def check(value: Value, info: ValidationInfo) -> Value:
        if isinstance(value, list | dict):
            _within(name, len(value), f"has {len(value)} entries", info)
        return value

    return check


def _within(name: str, size: int, what: str, info: ValidationInfo) -> None:
    cap = getattr(_bounds(info).limits, name)
    if size > cap:
        field = info.field_name
        raise LimitExceeded(f"{field!r} {what}, but the most here is {cap}.", field)


def longest(name: str) -> Callable[[list[str], ValidationInfo], list[str]]:
    """The cap of `Limits` with this name, on the bytes of each text."""

    def check(texts: list[str], info: ValidationInfo) -> list[str]:
        cap = getattr(_bounds(info).limits, name)
        if any(len(text.encode()) > cap for text in texts):
            field = info.field_name
            raise LimitExceeded(f"An entry of {field!r} is longer than {cap} bytes.", field)
        return texts

    return check


def in_vocabulary(ids: list[int], info: ValidationInfo) -> list[int]:
    check_ids(ids, _bounds(info), info.field_name)
    return ids


def check_ids(ids: list[int], bounds: Bounds, field: str | None) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < bounds.vocabulary:
        wrong = next(id for id in ids if not 0 <= id < bounds.vocabulary)
        raise InvalidField(
            f"{field!r} has the token id {show(wrong)}, but this model's ids are"
            f" 0 … {bounds.vocabulary - 1}.",
            field,
        )


def strings(value: Any) -> Any:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


def no_empty(texts: list[str], info: ValidationInfo) -> list[str]:
    if "" in texts:
        raise InvalidField(f"{info.field_name!r} has an empty string.", info.field_name)
    return texts


def prompts(value: Any, info: ValidationInfo) -> list[str] | list[list[int]]:
    """A text, texts, token ids, or lists of them; null is the beginning of a document."""
    field, most = info.field_name, _bounds(info).limits.prompts
    if value is None:
        return [""]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        wanted = "must be a text, a list of texts, token ids, or lists of token ids"
        found = "empty" if value == [] else show(value)
        raise InvalidField(f"{field!r} {wanted}; it is {found}.", field)
    if type(value[0]) is int:
        value = [value]
    if len(value) > most:
        raise LimitExceeded(f"{field!r} has {len(value)} prompts; the most is {most}.", field)
    if all(type(one) is str for one in value):
        return list(value)
    for one in value:
        if type(one) is not list or any(type(id) is not int for id in one):
            raise InvalidField(f"{field!r} mixes kinds, or holds {show(one)}.", field)
        check_ids(one, _bounds(info), field)
    return list(value)


def parse(
    kind: type[Body],
    body: dict[str, Any],
    bounds: Bounds,
    not_served: NotServed,
    lenient: bool = False,
) -> tuple[Body, list[str]]:
    """The checked body, and what to warn of. A field that is null was not sent."""
    sent = {name: value for name, value in body.items() if value is not None or name == "prompt"}
    asked = {name: value for name, value in sent.items() if not _neutral(name, value, not_served)}
    warnings: list[str] = []

    def unknown(name: str, path: str, of: type[BaseModel]) -> None:
        near = difflib.get_close_matches(name[:SHOWN], of.model_fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        said = f"There is no field {path[:SHOWN]!r}{hint}"
        if not lenient:
            raise UnknownField(said, path[:SHOWN])  # a name for it would be a cycle
        warnings.append(said)

    try:
        return kind.model_validate(_known(kind, asked, "", unknown), context=bounds), warnings
    except ValidationError as error:
        raise _error(error.errors(include_url=False)[0]) from None
    finally:
        del warnings[WARNED:]


Unknown = Callable[[str, str, type[BaseModel]], None]


def _known(kind: type[BaseModel], body: dict[str, Any], path: str, unknown: Unknown) -> Any:
    """The body without what no field is for, here and in the objects inside."""
    made, fields = {}, kind.model_fields  # which is looked up anew each time
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            unknown(name, path + name, kind)
        else:
            made[name] = _inside(field.annotation, value, path + name, unknown)
    return made


def _inside(hint: Any, value: Any, path: str, unknown: Unknown) -> Any:
    if not isinstance(value, dict | list):
        return value
    inner = next((x for x in get_args(hint) if isinstance(x, type)), None)
    if inner is None or not issubclass(inner, BaseModel):
        return value
    if isinstance(value, dict):
        return _known(inner, value, path + ".", unknown)
    return [
        _known(inner, one, f"{path}[{i}].", unknown) if isinstance(one, dict) else one
        for i, one in enumerate(value)
    ]


def _neutral(name: str, value: Any, not_served: NotServed) -> bool:
    """Whether a field that we do not serve asks for nothing anyway."""
    if name not in not_served:
        return False
    neutral, why = not_served[name]
    if any(type(value) is type(x) and value == x for x in neutral):
        return True
    raise UnsupportedField(f"{name!r} is not supported: {why}.", name)


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
    "string_too_long": ("max_length", "at most {} characters long"),
    "literal_error": ("expected", "{}"),
}


def _error(error: ErrorDetails) -> KvistError:
    path, what = _path(error["loc"]), error["type"]
    if what == "missing":
        return MissingField(f"{path!r} is missing.", path)
    if what == "too_short":
        few = error.get("ctx", {})
        wanted, has = few.get("min_length"), few.get("actual_length")
        return InvalidField(f"{path!r} must have {wanted} or more entries, but has {has}.", path)
    if what in _BOUNDS:
        name, phrase = _BOUNDS[what]
        wanted = phrase.format(error.get("ctx", {}).get(name))
    else:
        wanted = _WANTED.get(what, "of another kind")
    return InvalidField(f"{path!r} must be {wanted}, but is {show(error['input'])}.", path)


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].role`; names of a union's branches are the library's and left out."""
    text = ""
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not text:
            text = step
        elif step.replace("_", "").isalnum() and step not in _BRANCHES:
            text += f".{step}"
    return text


_BRANCHES = {"str", "int", "float", "bool"}
