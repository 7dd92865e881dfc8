"""Weights in fewer bits, against plain numpy and against the float decoder they stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.linear import Fp8Weight, Int4Weight, Int8Weight, Quantised, dequantize
from model import quantize
from model.cache import Rows
from model.checkpoint import CheckpointError, locate
from model.decoder import Decoder
from model.tokenizer import Tokenizer
from model.weights import load
from tests.model.families import make

DEFAULT = locate(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder)
    return folder


def rounded_weights(decoder: Decoder) -> dict[str, Quantised]:
    return {
        f"{name}.weight": module.weight
        for name, module in decoder.named_modules()
        if isinstance(getattr(module, "weight", None), Int8Weight | Int4Weight | Fp8Weight)
    }


def oracle(weight: NDArray[np.float32], group: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric rounding, one scale for the largest of each run; halves to the even neighbour."""
    out, inner = weight.shape
    runs = weight.reshape(out, inner // (group or inner), -1)
    scales = np.abs(runs).max(-1) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(scales[..., None] > 0, runs / scales[..., None], 0)
    return np.rint(ratio).astype(np.int8).reshape(out, inner), scales


def logits(decoder: Decoder) -> Tensor:
    tokens = torch.arange(2, 34)
    with torch.no_grad():
        return decoder.logits(decoder(tokens, Rows.alone([32])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 8, 64])
@pytest.mark.parametrize("turned", [False, True])
def test_rounding_equals_numpy(dtype: torch.dtype, group: int, turned: bool) -> None:
    """… in pieces smaller than the weight, and of a weight that lies transposed in its file."""
    torch.manual_seed(group)
    weight = (torch.randn(300, 192) * torch.rand(300, 1) * 10).to(dtype)
    weight[7] = 0
    weight[9, 3] = 60_000  # one giant drowns its row; the other rows do not notice
    weight = weight.T.contiguous().T if turned else weight
    room = quantize.empty(torch.Size((310, 192)), "int8", group, "cpu")
    values, scales = oracle(weight.float().numpy(), group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "PIECE", 192 * 37)
        quantize.fill(room, slice(10, 310), weight)
    assert np.array_equal(room.values[10:].numpy(), values)
    np.testing.assert_allclose(room.scales[10:].numpy(), scales, rtol=0, atol=1e-37)
    back = dequantize(Int8Weight(room.values[10:], room.scales[10:]), torch.float32).numpy()
    expected = values.reshape(300, scales.shape[1], -1).astype(np.float32) * scales[..., None]
    np.testing.assert_array_equal(back, expected.reshape(300, 192))
    bound = np.repeat(scales, 192 // scales.shape[1], 1) * 0.5001
    assert (np.abs(back - weight.float().numpy()) <= bound).all()


def test_what_becomes_int8_and_what_stays(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    decoder = load(tmp_path, dtype="float32", quantization="int8")
    rounded = rounded_weights(decoder)
    assert set(rounded) == {
        f"layers.{i}.attention.{x}.weight" for i in range(3) for x in ("qkv", "out")
    }
    assert not set(rounded) & {name for name, _ in decoder.named_parameters()}
    router = decoder.get_submodule("layers.0.mlp.router")
    assert isinstance(router.weight, nn.Parameter)


@pytest.mark.parametrize("label", ["llama", "gpt2", "bloom", "phi3"])
@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int8", 16), ("int4", 0), ("fp8", 0)])
def test_on_load_equals_after_load(
    label: str, kind: quantize.Quantize, group: int, tmp_path: Path
) -> None:
    """Tensor by tensor into stacked rows gives what rounding the whole decoder gives."""
    make(label, tmp_path)
    ours = load(tmp_path, dtype="float32", quantization=kind, group=group)
    whole = load(tmp_path, dtype="float32")
    quantize.quantize(whole, kind, group)
    one, other = rounded_weights(ours), rounded_weights(whole)
    assert one.keys() == other.keys()
    assert len(one) == 3 * 4
    for name, weight in one.items():
        assert torch.equal(weight.values, other[name].values)
        assert torch.equal(weight.scales, other[name].scales)
    assert torch.equal(logits(ours), logits(whole))


@pytest.mark.parametrize("group", [0, 16])
def test_the_output_stays_close_to_float(group: int, folder: Path) -> None:
    """Rounding to 1/254 of the largest of 64 normal numbers is an error of about 0.7 % a product,
    and activations are rounded alike; through three layers less than 4 % of the logits' size."""
    whole = logits(load(folder, dtype="float32"))
    ours = logits(load(folder, dtype="float32", quantization="int8", group=group))
    error = ((ours - whole).norm() / whole.norm()).item()
    assert 0 < error < 0.04
    assert (ours.argmax(-1) == whole.argmax(-1)).float().mean() > 0.9


def test_smaller_groups_are_closer(folder: Path) -> None:
    whole = dict(load(folder, dtype="float32").named_parameters())

    def error(group: int) -> float:
        rounded = rounded_weights(load(folder, dtype="float32", quantization="int8", group=group))
        return sum(
            (dequantize(weight, torch.float32) - whole[name]).norm().item()
            for name, weight in rounded.items()
        )

    assert error(8) < error(16) < error(0)


@pytest.mark.parametrize(
    ("kind", "most"), [("int8", 0.005), ("fp8", 0.015), ("int4", 0.3)]
)  # measured: 0.0015, 0.0048, 0.09 nats
def test_the_embedded_model_says_nearly_the_same(
    kind: quantize.Quantize, most: float, text: Tensor
) -> None:
    whole, ours = (chances(kind, text) for kind in ("none", kind))
    divergence = (whole.exp() * (whole - ours)).sum(-1).mean().item()
    assert 0 < divergence < most


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Code, of which the embedded model was made."""
    words = Tokenizer.load(DEFAULT)
    return torch.tensor(words.encode(Path(quantize.__file__).read_text())[:256])


def chances(kind: quantize.Quantize, text: Tensor) -> Tensor:
    decoder = load(DEFAULT, dtype="float32", quantization=kind)
    with torch.inference_mode():
        found = decoder.logits(decoder(text, Rows.alone([len(text)])))
    return found.double().log_softmax(-1)


def test_four_bits_take_the_largest_group_that_fits() -> None:
    for inner, group in ((256, 128), (704, 64), (96, 32), (50, 50)):
        room = quantize.empty(torch.Size((3, inner)), "int4", 0, "cpu")
        assert room.values.shape == (3, inner // 2)
        assert room.scales.shape == (3, inner // group)
    with pytest.raises(ValueError, match="groups of 7: two weights share a byte"):
        quantize.empty(torch.Size((3, 7)), "int4", 0, "cpu")


@pytest.mark.parametrize("kind", quantize.FORMATS)
def test_weights_are_counted_in_however_few_bits(kind: str, folder: Path) -> None:
    decoder = load(folder)
    whole = quantize.count(decoder)
    quantize.quantize(decoder, kind, 16)
    assert quantize.count(decoder) == whole == sum(p.numel() for p in load(folder).parameters())


def test_a_group_that_does_not_divide_is_refused(folder: Path) -> None:
    sentence = (
        r"layers\.0\..* cannot become int8: rows of \d+ weights cannot be cut into groups of 7"
    )
    with pytest.raises(CheckpointError, match=sentence):
        load(folder, quantization="int8", group=7)


def test_an_unknown_format_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantization 'int3' is not known"):
        load(folder, quantization="int3")  # type: ignore[arg-type]
