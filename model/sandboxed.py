"""A process that renders chat templates, and that the kernel ends when one takes too long.

A template is a stranger's program. Jinja's sandbox keeps it from our objects, but not from looping
for ever, nor from making a string of a terabyte, and no thread can be stopped from outside. So it
runs here: a timer of the kernel ends the process (the default action of its signal, so nothing in
Python can hold it up), and a limit on memory makes a bomb an error. `model/sandbox.py` starts this
file as a program and talks to it in lines of JSON; therefore it imports nothing of ours.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 30  # bytes of address space; Python and Jinja need a tenth
WALL = 20  # times the seconds of CPU: for a machine so busy that a second of work takes as long


class Refusal(Exception):
    """What a template says with raise_exception."""


# ── what templates of the hub expect to find ──────────────────────────────────────────────────


class Generation(Extension):
    """{% generation %} marks what a model said, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012, Jinja reads it from the class

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class Names(Namespace):
    """namespace() without names that begin with an underscore: they lead to Python's insides."""

    def __init__(*args: Any, **names: Any) -> None:  # `self` may be one of the names
        self, *rest = args
        names = dict(*rest, **names)
        for name in names:
            _refuse_private(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no place for {name!r}")


def _make_dict(*args: Any, **items: Any) -> dict[Any, Any]:
    return dict(*args, **items)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own makes text safe for HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: object) -> None:
    raise Refusal(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    made.globals |= {"dict": _make_dict, "namespace": Names}
    return made


# ── the process ───────────────────────────────────────────────────────────────────────────────


def render(template: jinja2.Template, size: int, names: dict[str, Any]) -> dict[str, Any]:
    pieces, length = [], 0
    for piece in template.generate(names):
        length += len(piece)
        if length > size:
            return {"long": True}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def answer(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU, so that a busy machine fails nobody
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL)
    try:
        return work()
    except Refusal as refusal:
        return {"refusal": str(refusal)[:1000]}
    except MemoryError:
        return {"wrong": "it needs too much memory"}
    except Exception as error:  # whatever a stranger's program may raise
        return {"wrong": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit() -> None:
    for timer in (signal.SIGPROF, signal.SIGALRM):  # a parent's ignoring would be inherited
        signal.signal(timer, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [timer])
    limits = {"AS": MEMORY, "CORE": 0, "FSIZE": 0}  # no dumps, and no files at all
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def main() -> None:
    """First come the templates and their caps, then jobs: a template's name, and what it is given.
    Each line is answered by one."""
    limit()
    start = json.loads(sys.stdin.readline())
    seconds, size = start["seconds"], start["size"]
    templates: dict[str, jinja2.Template] = {}

    def begin() -> dict[str, Any]:
        env = environment()
        templates.update({name: env.from_string(text) for name, text in start["sources"].items()})
        return {}

    say(answer(begin, seconds))
    for line in sys.stdin:
        name, names = json.loads(line)
        say(answer(partial(render, templates[name], size, names), seconds))


def say(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
