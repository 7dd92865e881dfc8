"""Pages in fewer bits through the whole engine: what holds with floats holds with them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import native
from model.cache import FORMATS, Cache
from model.decoder import Decoder
from model.device import has_bfloat16
from model.pack import pack_decoder
from model.quantize import Quantize
from model.runner import Runner
from model.sampling import Sampling
from model.weights import load
from server import Engine as OfflineEngine
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Beams, Event, Request
from server.errors import SettingError
from tests.server.test_engine import run
from tests.server.tiny import VOCABULARY, make

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(make(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)


def engine_of(
    decoder: Decoder, dtype: torch.dtype, pages: int, chunk: int, caching: bool, page: int = 4
) -> Engine:
    runner = Runner(decoder, Cache(decoder.config, pages, page, dtype), seats=16)
    options = Options(
        seats=16, budget=32, chunk=chunk, vocabulary=VOCABULARY, queue_tokens=1 << 20, draft=2
    )
    return Engine(runner, Pages(pages, page, caching=caching), options)


def requests() -> list[Request]:
    """Beginnings in common; greedy, drawn, two choices, and beams that copy pages."""
    trunk = [i * 37 % 250 for i in range(30)]
    return [
        Request(
            id=str(i),
            prompt=[*trunk[: 7 + i * 11 % 20], i],
            max_tokens=12 + i % 5,
            sampling=GREEDY if i % 3 == 2 else Sampling(temperature=i % 2, seed=i),
            n=1 + (i == 1),
            beams=Beams(width=3) if i % 3 == 2 else None,
            logprobs=1,
        )
        for i in range(9)
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_any_mix_gives_what_each_gets_alone(decoder: Decoder, name: str) -> None:
    """Preempted, chunked, copied on write, found in the prefix cache, drafted: the same tokens."""
    dtype = FORMATS[name]
    engine = engine_of(decoder, dtype, pages=22, chunk=5, caching=True)
    together = run(engine, requests())
    assert engine.stats.preemptions > 0
    assert engine.stats.cache_hits > 0
    for request in requests():
        alone = engine_of(decoder, dtype, pages=64, chunk=0, caching=False)
        expected = run(alone, [request])[request.id]
        for choice, other in zip(_told(together[request.id]), _told(expected), strict=True):
            assert choice.tokens == other.tokens
            # A sum in another order may round to the next of 255 steps.
            assert choice.logprobs == pytest.approx(other.logprobs, abs=0.03)


@pytest.mark.skipif(not native.has_int8(), reason="this processor has no AVX-512 VNNI")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_models_are_the_same_bits_in_any_company(kind: Quantize, tmp_path: Path) -> None:
    """A token costs rounded products and rounded pages, and neither depends on who is beside it,
    on chunks of its prompt, or on whether it was a prompt's or was drawn and computed again."""
    decoder = load(make(tmp_path), dtype=torch.float32, quantization=kind, head=True)
    pack_decoder(decoder)
    engine = engine_of(decoder, torch.bfloat16, pages=9, chunk=5, caching=True, page=16)
    together = run(engine, requests())
    assert engine.stats.preemptions > 0
    assert decoder.whole is not None
    decoder.whole = None  # from here layer by layer
    for request in requests():
        alone = engine_of(decoder, torch.bfloat16, pages=64, chunk=0, caching=False, page=16)
        expected = run(alone, [request])[request.id]
        for choice, other in zip(_told(together[request.id]), _told(expected), strict=True):
            assert (choice.tokens, choice.logprobs) == (other.tokens, other.logprobs)


@pytest.mark.skipif(not native.has_int8(), reason="this processor has no AVX-512 VNNI")
def test_bytes_bring_bfloat16_pages_unless_told(tmp_path: Path) -> None:
    folder = str(make(tmp_path))

    def kept(**how: Any) -> str:
        info = OfflineEngine(folder, device="cpu", pages=64, **how).info
        assert not info["warnings"]
        return str(info["kv_dtype"])

    assert kept() == kept(quantize="int8", kv_dtype="float32") == "float32"
    assert kept(quantize="int8", page_size=8) == "float32"
    assert kept(quantize="int8") == ("bfloat16" if has_bfloat16() else "float32")
    assert kept(kv_dtype="bfloat16") == "bfloat16"
    with pytest.raises(SettingError, match="multiple of 16"):
        OfflineEngine(folder, device="cpu", pages=64, page_size=8, kv_dtype="bfloat16")
    with pytest.raises(SettingError, match="native CPU kernels"):
        OfflineEngine(folder, device="cpu", pages=64, kv_dtype="bfloat16", kernels="reference")


def _told(event: Event) -> list[Any]:
    assert event.error is None
    return sorted(event.choices, key=lambda choice: choice.index)


@pytest.mark.parametrize(
    "flag", [{"kv_dtype": "int8"}, {"kv_dtype": "fp8"}, {"quantize": "fp8"}, {"quantize": "int4"}]
)
def test_a_flag_is_all_it_takes(flag: dict[str, Any], tmp_path: Path) -> None:
    """As the server starts it: much the same text, and a word where a CPU is slow at this."""
    folder, prompts, said = make(tmp_path), ["one", "two and more", "three"], []
    for how in ({}, flag):
        engine = OfflineEngine(str(folder), device="cpu", pages=64, **how)
        events = engine.generate(prompts, max_tokens=4, sampling=GREEDY, progress=False)
        said += [[token for event in events for token in event.choices[0].tokens]]
        warned = any(value in warning for value in how.values() for warning in _warnings(engine))
        native_too = how.get("quantize") == "int4" and native.has_int8()
        assert warned == bool(how and not native_too)
    same = [one == other for one, other in zip(*said, strict=True)]
    assert sum(same) > len(same) / 2


def _warnings(engine: OfflineEngine) -> list[str]:
    found: list[str] = engine.info["warnings"]
    return found


def test_what_depends_on_the_batch_is_not_called_deterministic(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--kv-dtype fp8 has no native attention"):
        OfflineEngine(
            str(make(tmp_path)), device="cpu", pages=64, kv_dtype="fp8", deterministic=True
        )
