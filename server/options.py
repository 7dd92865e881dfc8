"""`Settings` from flags, then `KVIST_*` variables, then a settings file, then the defaults.

Everything is read off the dataclass: a flag's name, type, choices, group and help. A name that
is not known is an error wherever it stands: a setting with a typing error is not the default.
"""

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from server.config import FOLDER, Bounds, Form, Limits, Settings
from server.errors import SettingError

PREFIX = "KVIST_"
CONFIG = "KVIST_CONFIG"
SHOWN = 80  # characters of a wrong value in its sentence
LIMIT = "limit_"  # --limit-n, KVIST_LIMIT_N, and n in the table [limits]
GROUPS = {
    "model": "what is served",
    "engine": "how it is computed",
    "http": "where it is asked",
    "security": "who may ask",
    "life": "start, stop, and what is told",
    "limits": "what is refused",
}
WORDS = {"1": True, "true": True, "yes": True, "on": True}
WORDS |= {"0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Option:
    """One field, and how its value is read from text."""

    name: str
    kind: Any  # its type, without None
    default: Any
    group: str
    help: str
    also: tuple[str, ...]
    within: Bounds | Form

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...] | None:
        return get_args(self.kind) if get_origin(self.kind) is Literal else None

    @property
    def many(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def wanted(self) -> str:
        """In words."""
        if self.choices:
            return " or ".join(self.choices)
        kind = _WANTED.get(self.kind, "")
        return kind if self.kind is bool else f"{kind} {self.within}".strip()

    def read(self, value: Any, where: str) -> Any:
        """The value of the field that this text, or this value of a TOML file, means."""
        try:
            return self._read(value)
        except (ValueError, TypeError, KeyError, AttributeError):
            shown = repr(value) if len(repr(value)) < SHOWN else repr(value)[:SHOWN] + "…"
            raise SettingError(f"{where} is {shown}, but must be {self.wanted}.") from None

    def _read(self, value: Any) -> Any:
        if self.many:
            listed = value.split(",") if isinstance(value, str) else value
            return tuple(self._bounded(str(item).strip()) for item in listed)
        if self.kind is bool:
            return value if isinstance(value, bool) else WORDS[value.lower()]
        if isinstance(value, bool) or (self.kind is int and isinstance(value, float)):
            raise ValueError
        if self.choices:
            return self.choices[self.choices.index(value)]
        return self.kind(self._bounded(self.kind(value) if self.number else value))

    @property
    def number(self) -> bool:
        return self.kind in (int, float)

    def _bounded(self, value: Any) -> Any:
        if value not in self.within:
            raise ValueError
        return value


_WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


def options() -> Iterator[Option]:
    """Every field of Settings and of its Limits."""
    yield from fields_of(Settings)
    yield from fields_of(Limits, LIMIT)


def fields_of(owner: Any, prefix: str = "") -> Iterator[Option]:
    """Those of a dataclass that `config.option` made."""
    hints = get_type_hints(owner)
    for one in dataclasses.fields(owner):
        if one.metadata:
            hint, meta = hints[one.name], one.metadata
            inner = [x for x in get_args(hint) if x is not NoneType]
            kind = inner[0] if NoneType in get_args(hint) else hint
            told = [meta[key] for key in ("group", "help", "also", "within")]
            yield Option(prefix + one.name, kind, one.default, *told)


def add_flags(
    parser: argparse.ArgumentParser, names: Iterable[str] = GROUPS, positional: bool = False
) -> None:
    """The options of some groups; an absent flag leaves no trace, so that the rest can speak."""
    if positional:
        parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_help("model"))
    parser.add_argument("--config", metavar="FILE", help="a TOML file with any of these settings")
    groups = {name: parser.add_argument_group(name, GROUPS[name]) for name in names}
    for one in options():
        if one.group in groups:
            add_flag(groups[one.group], one)


def add_flag(group: Any, one: Option) -> None:
    shape: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": one.name}
    if one.kind is bool:
        shape["action"] = argparse.BooleanOptionalAction
    elif one.choices:
        shape["metavar"] = "|".join(one.choices)
    else:
        shape["metavar"] = "LIST" if one.many else getattr(one.kind, "__name__", "X").upper()
    group.add_argument(one.flag, help=_say(one), **shape)
    for alias in one.also:
        group.add_argument(alias, **shape | {"help": argparse.SUPPRESS})


def _help(name: str) -> str:
    return next(one.help for one in options() if one.name == name)


def _say(one: Option) -> str:
    known = "" if one.default in (None, ()) else f" [{one.default}]"
    return (one.help + known).replace("%", "%%")


def settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: str | None = None
) -> Settings:
    """The settings that flags, variables and file make together."""
    known = {one.name: one for one in options()}
    values = dict(_from_file(config or environ.get(CONFIG), known))
    values |= _from_variables(environ, known)
    values |= {key: known[key].read(flags[key], known[key].flag) for key in flags if key in known}
    caps = {key.removeprefix(LIMIT): values.pop(key) for key in [*values] if LIMIT in key}
    made = Settings(**values, limits=Limits(**caps))
    check(made)
    return made


def _from_variables(environ: Mapping[str, str], known: Mapping[str, Option]) -> dict[str, Any]:
    found = {}
    for name, value in environ.items():
        if name.startswith(PREFIX) and name != CONFIG and value:  # empty is unset
            key = name[len(PREFIX) :].lower()
            found[key] = _known(key, name, known).read(value, f"The variable {name}")
    return found


def _from_file(path: str | None, known: Mapping[str, Option]) -> dict[str, Any]:
    if not path:
        return {}
    try:
        tree = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"The settings file {path} cannot be read: {error}.") from None
    flat = _flatten(tree)
    return {
        key: _known(key, name, known).read(value, f"{name!r} in {path}")
        for name, value in flat.items()
        for key in [name.replace("-", "_")]
    }


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are for readers: `[http] port = 1` is `port`, and `[limits] n = 4` is `limit_n`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        prefix = LIMIT if name == "limits" else ""
        inside = isinstance(value, dict) and name in GROUPS
        flat |= {prefix + key: one for key, one in value.items()} if inside else {name: value}
    return flat


def _known(key: str, said: str, known: Mapping[str, Option]) -> Option:
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, 1)
    raise SettingError(
        f"There is no setting {said!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
    )


def check(made: Settings) -> None:
    """What no single value can say."""
    if bool(made.tls_cert) != bool(made.tls_key):
        raise SettingError("TLS needs both: a certificate (tls_cert) and its key (tls_key).")


def check_files(made: Settings) -> None:
    """That each file and folder which is named is there, before anything slow is begun."""
    for one in options():
        path = getattr(made, one.name, None)
        if one.kind is Path and path is not None:
            folder = one.within is FOLDER
            if not path.exists() or path.is_dir() != folder:
                kind = "folder" if folder else "file"
                raise SettingError(f"{one.flag} is {str(path)!r}, but there is no such {kind}.")


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Settings from a command line alone, as tests and scripts want them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, positional=True)
    flags = vars(parser.parse_args(arguments))
    return settings(flags, environ, flags.get("config"))
