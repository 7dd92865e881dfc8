"""Who asks, when it runs, and what they get."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.engine.offline import Engine as Engine


def __getattr__(name: str) -> Any:
    """`from server import Engine`, without loading torch for those who only want `--help`."""
    if name == "Engine":
        return import_module("server.engine.offline").Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
