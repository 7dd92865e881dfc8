"""What keeps an engine from being built is one sentence that names it (T44, G12).

The model's own tests break folders in some hundred ways; here is that each kind comes out of the
engine as the error that ends the start.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.build import assemble
from server.errors import ModelError, SettingError
from tests.server import tiny


def write(name: str, text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(text)

    return apply


def change(**fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


BROKEN = {
    "a config that is none": (write("config.json", "{"), "config.json"),
    "a config that is a list": (write("config.json", "[]"), "config.json"),
    "no config": (remove("config.json"), "config.json"),
    "an unknown family": (change(model_type="abacus", architectures=["Abacus"]), "(?i)abacus"),
    "no number of heads": (change(num_attention_heads=None), "lacks 'attention_heads'"),
    "a width that is text": (change(hidden_size="wide"), "hidden is 'wide'"),
    "heads below zero": (change(num_attention_heads=-4), "heads"),
    "layers without weights": (change(num_hidden_layers=4), "model.safetensors: tensor"),
    "an absurd vocabulary": (change(vocab_size=9_999_999), "model.safetensors: tensor"),
    "code that it needs": (change(auto_map={"AutoModel": "own.Model"}, model_type="own"), "own"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "weights cut off": (truncate("model.safetensors", 5000), "model.safetensors.*truncated"),
    "an empty file of weights": (truncate("model.safetensors", 0), "model.safetensors"),
    "no words": (remove("tokenizer.json"), "tokenizer.json"),
    "words cut off": (truncate("tokenizer.json", 999), "tokenizer.json is not valid JSON"),
    "words that are a list": (write("tokenizer.json", "[]"), "tokenizer.json"),
    "words of an unknown kind": (
        write("tokenizer.json", '{"model": {"type": "Markov", "vocab": {"a": 0}}}'),
        "tokenizer",
    ),
    "roles that are none": (write("tokenizer_config.json", "{"), "tokenizer_config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_model_is_one_sentence(name: str, tmp_path: Path) -> None:
    breaks, says = BROKEN[name]
    breaks(tiny.make(tmp_path))
    with pytest.raises(ModelError, match=says) as told:
        assemble(model=str(tmp_path), device="cpu", pages=8, threads=1)
    assert told.value.message.isprintable()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": "nowhere/at/all"}, "nowhere"),
        ({"pages": 1 << 40}, r"tried to allocate \d+ bytes. Give it fewer --pages"),  # T69
        ({"device": "abacus"}, "device is 'abacus'; expected auto, cpu"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(
    wrong: dict[str, object], says: str, tmp_path: Path
) -> None:
    asked: dict[str, object] = {"model": str(tiny.make(tmp_path)), "threads": 1} | wrong
    with pytest.raises((SettingError, ModelError), match=says):
        assemble(**asked)  # type: ignore[arg-type]
