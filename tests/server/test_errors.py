"""The exception tree: nothing unmapped, and the page that draws it does not lie."""

import re

import pytest

from server import errors
from server.errors import BY_CODE, Failed, KvistError, StartError, family, from_code

STATUSES = {400, 401, 404, 405, 408, 413, 414, 415, 421, 429, 431, 499, 500, 503, 504}


@pytest.mark.parametrize("error", family(), ids=lambda error: error.__name__)
def test_every_error_can_be_told(error: type[KvistError]) -> None:
    said = error("It broke.", "n").body()["error"]
    assert said == {"message": "It broke.", "type": error.kind, "param": "n", "code": error.code}
    assert error.status in STATUSES
    assert re.fullmatch(r"[a-z_]+", error.kind)
    assert re.fullmatch(r"[a-z_]+", error.code)
    assert (error.retry_after is not None) == (error.status in (429, 503))


def test_codes_are_unique_and_lead_back() -> None:
    assert len(BY_CODE) == len(family())
    for error in family():
        assert type(from_code(error.code, "x")) is error
    assert type(from_code("never heard of", "x")) is Failed
    assert type(from_code(None, "x")) is Failed


def test_every_class_of_the_module_hangs_on_the_tree() -> None:
    classes = {x for x in vars(errors).values() if isinstance(x, type)}
    assert {x for x in classes if x.__module__ == errors.__name__} == set(family())


def test_the_drawing_is_the_tree() -> None:
    lines = (errors.__doc__ or "").splitlines()
    found = [re.match(r"    ([│├└─ ]*)([A-Z]\w+)\s+(.*)$", line) for line in lines]
    drawn = [(line[2], len(line[1]) // 4, line[3]) for line in found if line]
    real = [(error.__name__, len(error.__mro__) - 4) for error in family()]
    assert [(name, depth) for name, depth, _ in drawn] == real
    for name, _, says in drawn:
        error = getattr(errors, name)
        wire = f"{error.status} {error.code}"
        assert says.startswith(wire) != issubclass(error, StartError), name


def test_a_long_message_is_cut() -> None:
    assert len(KvistError("x" * 10**6).message) == errors.MESSAGE_LIMIT
