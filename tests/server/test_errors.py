"""The exception tree: nothing unmapped, and the page that draws it does not lie."""

import re

import pytest

from server import errors
from server.errors import BY_CODE, KvistError, StartError, family, from_code

OPENAI_STATUSES = {400, 401, 404, 405, 408, 413, 414, 415, 421, 429, 431, 499, 500, 503, 504}


@pytest.mark.parametrize("kind", family(), ids=lambda kind: kind.__name__)
def test_every_error_can_be_told(kind: type[KvistError]) -> None:
    told = kind("It broke.", "n").body()["error"]
    assert told == {"message": "It broke.", "type": kind.type, "param": "n", "code": kind.code}
    assert kind.status in OPENAI_STATUSES
    assert re.fullmatch(r"[a-z_]+", kind.type)
    assert re.fullmatch(r"[a-z_]+", kind.code)


def test_codes_are_unique_and_lead_back() -> None:
    assert len(BY_CODE) == len(family())
    for kind in family():
        assert type(from_code(kind.code, "x")) is kind
    assert type(from_code("never heard of", "x")) is errors.EngineError
    assert type(from_code(None, "x")) is errors.EngineError


def test_every_class_of_the_module_hangs_on_the_tree() -> None:
    defined = {x for x in vars(errors).values() if isinstance(x, type)}
    defined = {x for x in defined if x.__module__ == errors.__name__}
    assert defined == set(family())


def test_the_drawing_is_the_tree() -> None:
    lines = (errors.__doc__ or "").splitlines()
    found = [re.match(r"    ([│├└─ ]*)([A-Z]\w+)\s+(.*)$", line) for line in lines]
    drawn = [(line[2], len(line[1]) // 4, line[3]) for line in found if line]
    real = [(kind.__name__, len(kind.__mro__) - 4) for kind in family()]
    assert [(name, depth) for name, depth, _ in drawn] == real
    for name, _, rest in drawn:
        kind = getattr(errors, name)
        if issubclass(kind, StartError):
            assert not re.match(r"\d", rest), f"{name} never reaches the wire"
        else:
            word = kind.type if "_error" in rest.split()[1] and kind.code not in rest else kind.code
            assert rest.startswith(f"{kind.status} {word}"), name


def test_a_long_message_is_cut() -> None:
    assert len(KvistError("x" * 10**6).message) == errors.MESSAGE_LIMIT
