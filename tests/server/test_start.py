"""What keeps an engine from being built is one sentence that names it (T44, G12).

The model's own tests break folders in some hundred ways; here is that each kind comes out of the
engine as the error that ends the start.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks.soak.starts import BROKEN
from kernels import build
from kernels.backend import KERNELS
from model.checkpoint import CheckpointError
from model.start import start
from model.weights import load
from server.engine.build import assemble
from server.errors import ModelError, SettingError
from tests.model.families import make as family
from tests.server import tiny


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
        ({"pages": 1 << 40}, r"take \d+ MiB.* at most \d+$"),  # T69
        ({"device": "abacus"}, "device is 'abacus'; expected auto, cpu"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(
    wrong: dict[str, object], says: str, tmp_path: Path
) -> None:
    asked: dict[str, object] = {"model": str(tiny.make(tmp_path)), "threads": 1} | wrong
    with pytest.raises((SettingError, ModelError), match=says):
        assemble(**asked)  # type: ignore[arg-type]


def test_a_context_beyond_a_models_places_is_refused(tmp_path: Path) -> None:
    """Or the first long text would end the step, and on a GPU the engine."""
    config = family("gpt2", tmp_path).config
    with pytest.raises(CheckpointError, match=rf"--context is 9999, but .* {config.n_positions} "):
        load(tmp_path, context=9999)
    load(tmp_path, context=config.n_positions)


def test_a_context_beyond_what_the_model_was_made_for_is_told(tmp_path: Path) -> None:
    family("llama", tmp_path)
    made_for = start(tmp_path, pages=8).context
    assert start(tmp_path, pages=8, context=made_for).about["warnings"] == []
    (warning,) = start(tmp_path, pages=8, context=2 * made_for).about["warnings"]
    assert f"made for {made_for} tokens: up to {2 * made_for}" in warning


def test_pages_are_of_the_precision_that_was_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest weight picks it, whatever the embedding is kept in."""
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "native", kernel.native)
    monkeypatch.setattr("model.device.has_bfloat16", lambda: True)
    family("llama", tmp_path, head_dim=16)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    largest = max(tensors, key=lambda name: tensors[name].numel())
    assert "embed" not in largest
    brief = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for picked in (torch.float32, torch.bfloat16):
        brief[largest] = tensors[largest].to(picked)
        safetensors.torch.save_file(brief, path, {"format": "pt"})
        about = start(tmp_path, device="cpu", pages=8).about
        assert about["kv_dtype"] == str(picked).removeprefix("torch.")


def test_float32_keeps_weights_in_the_16_bits_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where native kernels multiply by them; and pages are float32, as it was asked for."""
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "native", kernel.native)
    family("llama", tmp_path).bfloat16().save_pretrained(tmp_path)
    ways = {"reference": "float32", "auto": "bfloat16" if build.here() else "float32"}
    for kernels, kept in ways.items():
        about = start(tmp_path, device="cpu", dtype="float32", pages=8, kernels=kernels).about
        assert (about["dtype"], about["kv_dtype"]) == ("float32", "float32")
        assert about["weights"] == kept
