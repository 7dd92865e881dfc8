"""What a folder says about its words, against transformers; and folders that are broken."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import CodeGenTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from model.tokenfiles import TokenizerError, read
from model.tokenizer import Tokenizer
from tests.model import words

TEXTS = [text for text in words.texts() if text][:60]


def two_files(made: words.Tokenizer, folder: Path, **config: Any) -> Path:
    """vocab.json and merges.txt, as the first byte-level models were published."""
    model = json.loads(made.to_str())["model"]
    for token in made.get_added_tokens_decoder().values():
        model["vocab"].setdefault(token.content, len(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "make", "config"),
    [
        (GPT2Tokenizer, words.gpt2, {}),
        (GPT2Tokenizer, words.gpt2, {"add_prefix_space": True}),
        (
            GPT2Tokenizer,
            words.gpt2,
            {"add_bos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        ),
        (GPT2Tokenizer, words.gpt2, {"add_bos_token": True, "add_eos_token": True}),
        (
            GPT2Tokenizer,
            words.gpt2,
            {
                "added_tokens_decoder": {
                    "900": {"content": "<x>", "special": True, "lstrip": True},
                    "901": {"content": "yy", "special": False, "normalized": True},
                }
            },
        ),
        (CodeGenTokenizer, words.gpt2, {}),
        (Qwen2Tokenizer, words.qwen2, {"pad_token": "<|im_end|>"}),
    ],
)
def test_vocab_and_merges_are_read_as_transformers_reads_them(
    kind: Any, make: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = two_files(make(), tmp_path, tokenizer_class=kind.__name__, **config)
    ours, theirs = Tokenizer.load(folder), kind.from_pretrained(folder)
    assert ours.engine == "tiktoken"
    for text in [*TEXTS, "a <x>yy <x>", "<|endoftext|>"]:
        for bos in (True, False):
            expected = theirs.encode(text, add_special_tokens=bos)
            assert ours.encode(text, special=True, bos=bos) == expected
    assert (ours.eos, ours.bos) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.special.keys() >= set(theirs.all_special_tokens)
    for skip in (True, False):
        assert ours.decode(range(-3, 700), skip) == theirs.decode(
            [i for i in range(700) if i < len(theirs)], skip_special_tokens=skip
        )


def test_added_tokens_of_old_come_in_their_order(tmp_path: Path) -> None:
    folder = two_files(words.gpt2(), tmp_path, tokenizer_class="GPT2TokenizerFast")
    size = read(folder).vocabulary.__len__()
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<a>"}))
    ours, theirs = Tokenizer.load(folder), GPT2Tokenizer.from_pretrained(folder)
    text = "x<a><b> <a>"
    assert ours.encode(text, special=True) == theirs.encode(text)
    assert ours.eos == size == theirs.eos_token_id


def test_the_model_tells_the_class_where_nobody_else_does(tmp_path: Path) -> None:
    folder = two_files(words.qwen2(), tmp_path)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert Tokenizer.load(folder).encode("1234") == Tokenizer.load(
        words.save(words.qwen2(), tmp_path / "whole")
    ).encode("1234")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(TokenizerError, match=r"known are GPT2Tokenizer, .*tokenizer.json"):
        Tokenizer.load(folder)


CONFIG = {
    "bos_token": {"content": "<|im_start|>", "lstrip": False},
    "eos_token": "<|im_end|>",
    "pad_token": None,
    "unk_token": "gone",
    "image_token": "<|endoftext|>",
    "extra_special_tokens": {"audio_token": "<|endoftext|>", "x": 1},
    "add_bos_token": True,
    "chat_template": "…",
}


def test_roles_are_read_from_every_place(tmp_path: Path) -> None:
    made = words.gpt2()
    start, end, text = (made.token_to_id(token) for token in words.SPECIAL)
    folder = words.save(made, tmp_path, tokenizer_config_json=CONFIG)
    read_ = Tokenizer.load(folder)
    assert (read_.bos, read_.eos, read_.ends) == (start, end, (end,))
    assert read_.names == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "image_token": "<|endoftext|>",
        "audio_token": "<|endoftext|>",
    }
    assert read_.encode("x") == read_.encode("x", bos=False), "tokenizer.json's template counts"
    words.save(made, tmp_path, generation_config_json={"eos_token_id": [text, end, 10**6, "x"]})
    assert Tokenizer.load(folder).ends == (end, text)
    words.save(made, tmp_path, tokenizer_config_json={}, config_json={"bos_token_id": start})
    assert Tokenizer.load(folder).ends == (text, end)
    assert Tokenizer.load(folder).bos == start
    (folder / "generation_config.json").unlink()
    words.save(made, tmp_path, config_json={"eos_token_id": text})
    assert Tokenizer.load(folder).ends == (text,)
    words.save(made, tmp_path, config_json={"eos_token_id": None})
    assert (Tokenizer.load(folder).eos, Tokenizer.load(folder).bos) == (None, None)


def test_a_token_with_a_role_is_special_whatever_it_is_flagged(tmp_path: Path) -> None:
    made = words.byte_level()
    made.add_tokens([words.added("<eos>", special=False)])
    loaded = Tokenizer.load(
        words.save(made, tmp_path, tokenizer_config_json={"eos_token": "<eos>"})
    )
    assert loaded.special["<eos>"] == loaded.eos
    assert loaded.eos not in loaded.encode("<eos>")
    assert loaded.decode(loaded.encode("a<eos>b", special=True)) == "ab"


def test_noise_truncation_and_padding_are_for_training(tmp_path: Path) -> None:
    for make in (words.gpt2, words.llama2):
        made = make()
        text = words.CORPUS[0]
        expected = made.encode(text).ids
        made.model.dropout = 0.9
        made.enable_truncation(4)
        made.enable_padding(length=4000)
        assert Tokenizer.load(words.save(made, tmp_path)).encode(text) == expected


def test_tokens_without_an_id_of_their_own_get_the_librarys(tmp_path: Path) -> None:
    """The library counts on; what a file claims is not what its model was trained with."""

    def change(document: dict[str, Any]) -> None:
        for i, token in enumerate(reversed(document["added_tokens"])):
            token["id"] = 5000 + 7 * i

    made = words.edited(words.gpt2(), change)
    document = json.loads(words.gpt2().to_str())
    change(document)
    words.save(made, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    text = "".join(words.SPECIAL)
    assert Tokenizer.load(tmp_path).encode(text, special=True) == made.encode(text).ids


# ── broken folders ────────────────────────────────────────────────────────────────────────────


def deep(levels: int) -> str:
    return '{"model":' + "[" * levels + "]" * levels + "}"


def broken() -> dict[str, str]:
    """Each is a tokenizer.json that must be one sentence."""
    whole = json.loads(words.gpt2().to_str())
    model = whole["model"]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    ctc = {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
    strip = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    changes: dict[str, dict[str, Any]] = {
        "no model": {"model": None},
        "a model that is a list": {"model": []},
        "no vocabulary": {"model": {"type": "BPE", "merges": []}},
        "an empty vocabulary": {"model": {**model, "vocab": {}, "merges": []}},
        "ids that are text": {"model": {**model, "vocab": {"a": "0"}}},
        "ids below zero": {"model": {**model, "vocab": {**model["vocab"], "a": -1}}},
        "ids past all bounds": {"model": {**model, "vocab": {**model["vocab"], "a": 2**62}}},
        "ids that are fractions": {"model": {**model, "vocab": {**model["vocab"], "a": 0.5}}},
        "one id twice": {"model": {**model, "vocab": {**model["vocab"], "q": 70}}},
        "merges of nothing": {"model": {**model, "merges": [["q", "nothing"]]}},
        "merges of three": {"model": {**model, "merges": ["a b c"]}},
        "merges of numbers": {"model": {**model, "merges": [[1, 2]]}},
        "an unknown model": {"model": {**model, "type": "Markov"}},
        "pieces without scores": {"model": {**unigram, "vocab": ["a", "b"]}},
        "scores that are text": {"model": {**unigram, "vocab": [["a", "b"]]}},
        "an unknown token far out": {"model": {**unigram, "unk_id": 7}},
        "added tokens that are an object": {"added_tokens": {"a": 1}},
        "added tokens without content": {"added_tokens": [{"id": 1}]},
        "an added token that is a number": {"added_tokens": [7]},
        "an unknown normalizer": {"normalizer": {"type": "Rot13"}},
        "a broken charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}},
        "an unknown pre-tokenizer": {"pre_tokenizer": {"type": "Scissors"}},
        "a broken regex": {"pre_tokenizer": {**split, "pattern": {"Regex": "("}}},
        "a pre-tokenizer that is text": {"pre_tokenizer": "ByteLevel"},
        "a post-processor without the text": {"post_processor": {**template, "single": []}},
        "a template token that is not": {"post_processor": {**template, "single": [bos]}},
        "an unknown decoder": {"decoder": {"type": "Enigma"}},
        "a decoder for speech": {"decoder": ctc},
        "a decoder that strips the end": {
            "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, strip]}
        },
    }
    files = {name: json.dumps({**whole, **change}) for name, change in changes.items()}
    cut = json.dumps(whole)[:-100]
    texts = {"empty": "", "a list": "[]", "a number": "7", "cut off": cut, "html": "<html>"}
    return files | texts | {"no end of brackets": deep(100_000), "a NaN": '{"model": NaN}'}


BROKEN = broken()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(BROKEN[name])
    with pytest.raises(TokenizerError) as told:
        Tokenizer.load(tmp_path)
    sentence = str(told.value)
    assert "tokenizer" in sentence
    assert sentence.isprintable()
    assert len(sentence) <= 1000


def test_other_broken_files(tmp_path: Path) -> None:
    def told(match: str) -> None:
        with pytest.raises(TokenizerError, match=match):
            Tokenizer.load(tmp_path)

    told("has no tokenizer.json, nor vocab.json")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    told("has only tokenizer.model, which is not read; convert it")
    words.save(words.gpt2(), tmp_path)
    assert Tokenizer.load(tmp_path).eos is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["<|im_end|>"], "x": [}')
    told("tokenizer_config.json is not valid JSON")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"1": 2}}')
    told("2 is not an added token")
    (tmp_path / "tokenizer_config.json").write_text('["eos_token"]')
    told("holds no JSON object")
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"\xff": 1}')
    told("is not UTF-8")
    (tmp_path / "tokenizer_config.json").unlink()
    os.mkfifo(tmp_path / "tokenizer_config.json")
    told("not a regular file")
    (tmp_path / "tokenizer_config.json").unlink()
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)
    told("has 1099511627776 bytes; at most")


def test_merges_that_are_none(tmp_path: Path) -> None:
    folder = two_files(words.gpt2(), tmp_path, tokenizer_class="GPT2Tokenizer")
    with (folder / "merges.txt").open("a") as file:
        file.write("a b c\n")
    with pytest.raises(TokenizerError, match="'a b c' is not a pair"):
        Tokenizer.load(folder)
