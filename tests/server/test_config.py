"""Settings: one dataclass, four ways in, and no way to mistype one."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from server.config import FOLDER, Bounds, Limits, Settings, Wish
from server.errors import SettingError
from server.options import (
    GROUPS,
    Option,
    add_flags,
    check_files,
    fields_of,
    options,
    parse,
    settings,
)


def test_nothing_said_is_the_dataclass() -> None:
    assert parse([], {}) == Settings()


def test_every_field_is_an_option_once_with_a_group_and_a_sentence() -> None:
    names = [one.name for one in options()]
    fields = [one.name for one in dataclasses.fields(Settings) if one.name != "limits"]
    assert names == fields + ["limit_" + one.name for one in dataclasses.fields(Limits)]
    for one in options():
        assert one.group in GROUPS
        assert one.help
        assert not one.help.endswith(".")


def test_flags_beat_variables_beat_the_file(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    file.write_text('port = 1\nhost = "::1"\nrows = 7\n[limits]\nn = 3\nqueue-timeout = 2\n')
    made = parse(
        ["--port", "3", "--config", str(file)], {"KVIST_PORT": "2", "KVIST_HOST": "0.0.0.0"}
    )
    assert parse([], {"KVIST_LIMIT_N": "9"}).limits.n == 9
    assert (made.port, made.host, made.rows) == (3, "0.0.0.0", 7)
    assert (made.limits.n, made.limits.queue_timeout) == (3, 2.0)
    assert parse([], {"KVIST_CONFIG": str(file)}).port == 1
    assert parse([], {"KVIST_MODEL": "", "KVIST_API_KEYS": ""}) == Settings()


FORMS = {"device": "cuda:1", "otlp_endpoint": "http://a"}


def sample(one: Option) -> str:
    """A value that is not the default; nothing for what is true or false."""
    if isinstance(one.within, Bounds):
        return str(one.kind(one.within.most))
    return "" if one.kind is bool else FORMS.get(one.name, "a")


def test_every_option_can_be_said_in_every_way(tmp_path: Path) -> None:
    for one in options():
        text = sample(one) or str(not one.default).lower()
        said = {one.name: one.choices[-1] if one.choices else text}
        said |= {"tls_key": {"tls_cert": "b"}, "tls_cert": {"tls_key": "b"}}.get(one.name, {})
        file = tmp_path / "one.toml"
        bare = one.kind in (int, float, bool)
        file.write_text("\n".join(f"{k} = {v if bare else repr(v)}" for k, v in said.items()))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in said.items()]
        if one.kind is bool:
            flags = [one.flag if not one.default else one.flag.replace("--", "--no-")]
        made = [
            parse([said["model"]] if one.name == "model" else flags, {}),
            parse([], {f"KVIST_{k.upper()}": v for k, v in said.items()}),
            parse(["--config", str(file)], {}),
        ]
        assert made[0] == made[1] == made[2] != Settings(), one.name


def test_flags_of_other_servers_mean_the_same() -> None:
    arguments = ["--max-model-len", "9", "--served-model-name", "a,b", "--max-num-seqs=4"]
    made = parse(arguments, {})
    assert (made.context, made.served_name, made.rows) == (9, ("a", "b"), 4)


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--port", "x"], {}, "--port is 'x', but must be a whole number"),
        ([], {"KVIST_DTYPE": "f8"}, "KVIST_DTYPE is 'f8', but must be auto or float32"),
        ([], {"KVIST_PROT": "1"}, "did you mean 'port'"),
        (["--memory", "1.5"], {}, "above 0 and at most 1"),
        (["--tls-cert", "a"], {}, "needs both"),
        (["--port", "70000"], {}, "--port is '70000', but must be a whole number from 0 to 65535"),
        ([], {"KVIST_CONTEXT": "0"}, "KVIST_CONTEXT is '0', .* from 2 to 16777216"),
        (["--device", "abacus"], {}, "must be auto, cpu, cuda or cuda:1"),
        (["--config", "/nowhere.toml"], {}, "/nowhere.toml cannot be read"),
        ([], {"KVIST_LENIENT": "perhaps"}, "true or false"),
    ],
)
def test_a_bad_setting_is_named(arguments: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        parse(arguments, environ)


ODD = ["", " ", "x\0", "0", "-1", "-0.5", "nan", "inf", "1e999", "9" * 30, "9" * 9999, "x", "None"]


def said_of(one: Option, text: str) -> str:
    """What is wrong with it; nothing when it is taken."""
    try:
        one.read(text, one.flag)
    except SettingError as error:
        return error.message
    return ""


EVERY = [*options(), *fields_of(Wish)]


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_what_makes_no_sense_is_refused_in_one_sentence(one: Option) -> None:
    """Each flag with each odd value: taken because it can be meant, or named with what is wanted"""
    said = [said_of(one, text) for text in ODD]
    for text, sentence in zip(ODD, said):
        if sentence:
            assert sentence.startswith(f"{one.flag} is {text[:40]!r}"[:-1])
            assert sentence.endswith(f"but must be {one.wanted}.")
            assert len(sentence) < 250
            assert sentence.isprintable()
        elif one.number:
            assert one.read(text, one.flag) in one.within
        else:
            assert text.strip()
    assert all(said[:3])  # of what is empty, none
    if one.kind is not str and not one.many and one.kind is not Path:
        assert (
            len([*filter(None, said)]) >= len(ODD) - 4
        )  # zero, less and a large seed can make sense


@pytest.mark.parametrize("one", [one for one in EVERY if one.number], ids=lambda one: one.name)
def test_every_number_has_bounds_around_its_default(one: Option) -> None:
    """And both of its ends are as it says."""
    bounds = one.within
    assert isinstance(bounds, Bounds)
    assert one.default is None or one.default in bounds
    assert one.read(str(bounds.most), one.flag) == bounds.most
    for beyond in (bounds.most + 1, bounds.least - 1, bounds.least - (0 if bounds.open else 1)):
        with pytest.raises(SettingError):
            one.read(str(beyond), one.flag)


@pytest.mark.parametrize(
    "one", [one for one in options() if one.kind is Path], ids=lambda one: one.name
)
def test_a_file_that_is_not_there_is_named_at_once(one: Option, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    pairs = {"tls_cert": ["--tls-key", str(file)], "tls_key": ["--tls-cert", str(file)]}
    good, wrong = (tmp_path, file) if one.within is FOLDER else (file, tmp_path)
    check_files(parse([one.flag, str(good), *pairs.get(one.name, [])], {}))
    for path in (wrong, tmp_path / "nowhere"):
        with pytest.raises(SettingError, match=f"{one.flag} is '{path}', but there is no such f"):
            check_files(parse([one.flag, str(path), *pairs.get(one.name, [])], {}))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kvist.toml"
    for text, says in [
        ("prot = 1", "did you mean 'port'"),
        ("port = 1.5", "'port' in .* whole number"),
        ("port = true", "whole number"),
        ("port =", "cannot be read"),
    ]:
        file.write_text(text)
        with pytest.raises(SettingError, match=says):
            settings({}, {}, str(file))


def test_help_is_grouped() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for group, about in GROUPS.items():
        assert f"{group}:\n  {about}" in text
    assert "--max-model-len" not in text
