"""A request's head. The framework's mapping of it costs more than the four looks that are taken."""

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> str:
    """The first with this name, in small letters; empty without one."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return ""
