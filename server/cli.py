"""The command line. What a subcommand needs is imported when it runs: --help takes no torch."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from server.config import Settings, Wish
from server.errors import KvistError
from server.options import GROUPS, add_flag, add_flags, check_files, fields_of, options, settings
from server.version import VERSION

ENGINE = ("model", "engine")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    said = parser.parse_args(arguments)
    if said.run is None:
        parser.print_help()
        return 2
    try:
        status: int = said.run(said)
    except KvistError as error:
        print(f"kvist: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Kvist: a text-generation server whose beam search streams.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="")
    _add_serve(commands)
    _add_generate(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _command(
    commands: Any, name: str, arguments: str, about: str, run: Any
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        usage=f"python -m server {name} {arguments}",
        description=about[0].upper() + about[1:] + ".",
        allow_abbrev=False,
    )
    made.set_defaults(run=run)
    return made


def _settings(said: argparse.Namespace, groups: Iterable[str] = GROUPS) -> Settings:
    names = {one.name for one in options() if one.group in groups}
    flags = {name: value for name, value in vars(said).items() if name in names}
    made = settings(flags, os.environ, getattr(said, "config", None))
    check_files(made)
    return made


def _add_serve(commands: Any) -> None:
    made = _command(
        commands, "serve", "[MODEL] [options]", "serve a model over HTTP, with OpenAI's API", _serve
    )
    add_flags(made, GROUPS, positional=True)


def _serve(said: argparse.Namespace) -> int:
    chosen = _settings(said)
    from server.serve import run

    return run(chosen)


def _add_generate(commands: Any) -> None:
    made = _command(
        commands,
        "generate",
        "[MODEL] PROMPT [options]",
        "continue one text on the terminal",
        _generate,
    )
    add_flags(made, ENGINE, positional=True)
    made.add_argument("prompt", help="the text to go on from")
    wish = made.add_argument_group("wish", "what is asked")
    for one in fields_of(Wish):
        add_flag(wish, one)
    wish.add_argument("--stop", action="append", default=argparse.SUPPRESS, help="end before it")


def _generate(said: argparse.Namespace) -> int:
    chosen = _settings(said, ENGINE)
    said_of = {one: getattr(said, one.name, None) for one in fields_of(Wish)}
    wish = {one.name: one.read(text, one.flag) for one, text in said_of.items() if text is not None}
    wish["stop"] = tuple(getattr(said, "stop", ()))
    from server.generate import run

    return run(chosen, said.prompt, Wish(**wish))


def _add_bench(commands: Any) -> None:
    about = "measure this machine; what follows goes to python -m benchmarks"
    made = _command(commands, "bench", "[options]", about, _bench)
    made.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _bench(said: argparse.Namespace) -> int:
    """Become another program: nothing here may import what imports the server."""
    if find_spec("benchmarks") is None:
        print("kvist: the benchmarks are in the repository, not in the package.", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks", *said.rest]
    return os.execv(sys.executable, command)  # noqa: S606


def _add_doctor(commands: Any) -> None:
    _command(commands, "doctor", "", "say what this machine can run, and why not the rest", _doctor)


def _doctor(said: argparse.Namespace) -> int:  # noqa: ARG001
    from server.doctor import run

    return run()
