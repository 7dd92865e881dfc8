"""Log lines: for people, or one JSON object each. What clients wrote cannot break a line."""

import json
import logging
import sys
import time
from typing import Any

from server.config import Settings


class Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
            **getattr(record, "kvist", {}),
        }
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        more = getattr(record, "kvist", {})
        pairs = " ".join(f"{name}={_word(value)}" for name, value in more.items())
        line = f"{when} {record.levelname.lower():7} {_line(record.getMessage())} {pairs}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _word(value: Any) -> str:
    text = _line(str(value))
    return json.dumps(text) if " " in text or '"' in text else text


def set_up(settings: Settings) -> None:
    """All logs to stderr. A full disk or a closed pipe loses lines, never requests."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if settings.log == "json" else Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))
