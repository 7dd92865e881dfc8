"""`python -m server generate` and `doctor`: the words of the README, and transformers' text."""

from pathlib import Path

import pytest
import torch
import transformers

from model.tokenizer import Tokenizer
from server.cli import main
from tests.server.tiny import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny"))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", *words, "--threads", "1"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_and_a_prompt(folder: Path, beams: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer.load(folder)
    ids = words.encode("a prompt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=12,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
    )
    new = theirs[0, len(ids) :].tolist()
    flags = ("--max-tokens", "12", "--beams", str(beams))
    decoder = words.decoder(continuing=True)
    text = "".join(map(decoder.push, new)) + decoder.finish()
    assert said(capsys, str(folder), "a prompt", *flags) == f"a prompt{text}\n"


def test_a_seed_draws_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-tokens", "32", "--temperature", "0.8", "--top-k", "40", "--seed"]
    first = said(capsys, str(folder), "prompt", *flags, "1")
    assert said(capsys, str(folder), "prompt", *flags, "1") == first
    assert said(capsys, str(folder), "prompt", *flags, "2") != first


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "./nowhere", "prompt"]) != 0
    assert "nowhere" in capsys.readouterr().err


def test_a_wish_that_makes_no_sense_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is looked for."""
    assert main(["generate", "./nowhere", "prompt", "--temperature", "nan"]) == 2
    assert "--temperature is 'nan', but must be a number from 0 to 2." in capsys.readouterr().err


def test_the_doctor_says_what_runs_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "torch" in told
    assert "attention" in told
    if not torch.cuda.is_available():
        assert "– gpu" in told
