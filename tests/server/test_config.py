"""Settings: one dataclass, four ways in, and no way to mistype one."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from server.config import Limits, Settings
from server.errors import SettingError
from server.options import GROUPS, add_flags, options, parse, settings


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


def test_every_option_can_be_said_in_every_way(tmp_path: Path) -> None:
    for one in options():
        text = {int: "5", float: "0.5", bool: str(not one.default).lower()}.get(one.kind) or "a"
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
        (["--rows", "0"], {}, "at least 1"),
        (["--limit-n=-1"], {}, "negative"),
        (["--port", "70000"], {}, "65535"),
        (["--config", "/nowhere.toml"], {}, "/nowhere.toml cannot be read"),
        ([], {"KVIST_LENIENT": "perhaps"}, "true or false"),
    ],
)
def test_a_bad_setting_is_named(arguments: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        parse(arguments, environ)


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
