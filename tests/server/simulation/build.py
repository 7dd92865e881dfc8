"""An engine over the simulated executor, as a process can build it: no model, no torch."""

from collections.abc import Callable
from typing import Any

from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Request
from server.engine.scheduler import wordless
from server.engine.text import Text
from server.errors import ModelError
from tests.server.simulation.executor import VOCABULARY, Simulated


def build(pages: int = 4096, size: int = 16, **options: Any) -> Engine:
    options = {"vocabulary": VOCABULARY, **options}
    executor = Simulated(pages, size)
    answers: dict[str, Callable[..., Any]] = {
        "double": lambda number: 2 * number,
        "fail": _fail,
        "strange": lambda: object(),
    }
    info = {"pages": pages, "page_size": size, "vocabulary": VOCABULARY}
    return Engine(
        executor, Pages(pages, size), Options(**options), text=_text, info=info, answers=answers
    )


def broken() -> Engine:
    raise ModelError("The file weights.safetensors ends too early.")


def crash() -> Engine:
    raise SystemExit(7)


def _fail() -> None:
    raise ZeroDivisionError


def _text(request: Request) -> Text:
    if "\0odd" in request.stop:
        raise ValueError("a decoder that cannot be made")
    return wordless(request)
