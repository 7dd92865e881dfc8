"""Loading, against the safetensors library and transformers; and broken folders, each refused in
one line that names the file and the tensor, in bounded memory."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import memory
from model import weights
from model.cache import Rows
from model.checkpoint import CheckpointError
from model.decoder import Decoder
from model.quantize import chosen
from model.tensorfile import BITS, TensorFile
from model.tensorfile import WEIGHTS as WEIGHT_DTYPES
from model.weights import load
from tests.model.families import make

ROOT = Path(__file__).parents[2]
Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors, as the safetensors library reads them."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, folder / "model.safetensors")


def shard(folder: Path) -> None:
    """As transformers does it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> None:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def logits(decoder: Decoder) -> Tensor:
    tokens = torch.arange(2, 19)
    with torch.no_grad():
        return decoder.logits(decoder(tokens, Rows.alone([17])))


# ── what is loaded ────────────────────────────────────────────────────────────────────────────


def check_llama(decoder: Decoder, theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    expected = {
        "embed.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for i in range(3):
        layer = f"model.layers.{i}."
        parts = [theirs[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
        expected[f"layers.{i}.attention.qkv.weight"] = torch.cat(parts)
        expected[f"layers.{i}.attention.out.weight"] = theirs[layer + "self_attn.o_proj.weight"]
        parts = [theirs[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        expected[f"layers.{i}.mlp.up.weight"] = torch.cat(parts)
        expected[f"layers.{i}.mlp.down.weight"] = theirs[layer + "mlp.down_proj.weight"]
        expected[f"layers.{i}.attention_norm.weight"] = theirs[layer + "input_layernorm.weight"]
        expected[f"layers.{i}.mlp_norm.weight"] = theirs[layer + "post_attention_layernorm.weight"]
    ours = dict(decoder.named_parameters())
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.float() if "norm" in name else tensor.to(dtype)
        assert ours[name].dtype == wanted.dtype
        assert torch.equal(ours[name], wanted), name
        assert not ours[name].requires_grad


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "auto"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_is_what_the_library_reads(name: str, sharded: bool, folder: Path) -> None:
    if sharded:
        shard(folder)
    dtype = torch.float32 if name == "auto" else getattr(torch, name)
    check_llama(load(folder, dtype=name), stored(folder), dtype)
    check_llama(load(folder, dtype=dtype), stored(folder), dtype)


def test_a_terminal_sees_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, smallest, shown in (
        (Terminal(), 0, True),
        (Terminal(), weights.BAR, False),  # too little to wait for
        (io.StringIO(), 0, False),  # a log
    ):
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(weights, "BAR", smallest)
        load(folder)
        assert ("weights: 100%" in screen.getvalue()) == shown


def test_large_weights_live_in_huge_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HUGE", 1)
    check_llama(load(folder, dtype="bfloat16"), stored(folder), torch.bfloat16)


def test_auto_follows_the_largest_weight_where_the_device_can(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {n: t.bfloat16() if t.ndim > 1 else t for n, t in stored(folder).items()}
    save(folder, tensors)
    monkeypatch.setattr("model.device.has_bfloat16", lambda: True)
    assert load(folder).embed.weight.dtype == torch.bfloat16
    monkeypatch.setattr("model.device.has_bfloat16", lambda: False)
    assert load(folder).embed.weight.dtype == torch.float32


def test_tables_are_computed_and_nothing_is_left_on_meta(folder: Path) -> None:
    decoder = load(folder, dtype="bfloat16", context=32)
    tensors = [*decoder.parameters(), *decoder.buffers()]
    assert all(not tensor.is_meta for tensor in tensors)
    assert decoder.get_buffer("place.rope0").dtype == torch.float32
    assert decoder.get_buffer("place.rope0").shape[0] == 32


def test_known_buffers_are_skipped_whatever_their_dtype(tmp_path: Path) -> None:
    make("gpt2", tmp_path)
    before = logits(load(tmp_path, dtype="float32"))
    tensors = stored(tmp_path)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    save(tmp_path, tensors)
    assert torch.equal(logits(load(tmp_path, dtype="float32")), before)


@pytest.mark.parametrize("kind", ["absent", "same", "instead", "different"])
def test_a_tied_head(kind: str, folder: Path) -> None:
    """transformers 5 unties a head that differs from the embedding, and so do we."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = stored(folder)
    embedding = "model.embed_tokens.weight"
    head = tensors.pop("lm_head.weight")
    if kind == "same":
        tensors["lm_head.weight"] = tensors[embedding].clone()
    elif kind == "instead":
        tensors["lm_head.weight"] = tensors.pop(embedding)
    elif kind == "different":
        tensors["lm_head.weight"] = head
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = load(folder, dtype="float32")
    assert (ours.head is None) == (kind != "different")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(torch.arange(2, 19)[None]).logits[0]
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", ["gpt_oss", "mixtral", "gpt2", "bloom"])
def test_changes_on_the_way_survive_a_change_of_dtype(label: str, tmp_path: Path) -> None:
    """Stacks of experts, transposed and parted weights: load then round = round then load."""
    make(label, tmp_path)
    whole, rounded = load(tmp_path, dtype="float32"), load(tmp_path, dtype="bfloat16")
    for name, weight in rounded.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name).to(weight.dtype)), name


# ── broken folders ────────────────────────────────────────────────────────────────────────────

WEIGHTS = "model.safetensors"
SHARD = "model-00002-of-"
INDEX = "model.safetensors.index.json"
Break = Callable[[Path], None]
BROKEN: dict[str, tuple[Break, str]] = {}  # what is done to the folder, what is said


def broken(sentence: str) -> Callable[[Break], Break]:
    def add(function: Break) -> Break:
        BROKEN[function.__name__] = function, sentence
        return function

    return add


def with_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**stored(folder), **changes}
    save(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def with_entry(folder: Path, name: str, **changes: Any) -> None:
    header, data = read_raw(folder / WEIGHTS)
    header[name] = {**header.get(name, {}), **changes}
    write_raw(folder / WEIGHTS, header, data)


def with_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@broken(rf"{WEIGHTS} is not a safetensors file: it has 0 bytes, and the size of the header takes 8")
def empty_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@broken(rf"{WEIGHTS}: tensor '[a-z_.0-9]+' ends at byte \d+, and the file has \d+: it is truncated")
def truncated_data(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


@broken(rf"{WEIGHTS} is truncated, or not .* has 100 bytes, and its header alone claims \d+")
def truncated_header(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 100)


@broken(rf"{WEIGHTS} is truncated, or .* its header alone claims 4611686018427387904")
def header_of_2_to_the_62(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])


@broken(rf"{WEIGHTS} has a header of \d+ bytes; at most 16777216 are read")
def million_tensors(folder: Path) -> None:
    entry = b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}'
    write_raw(folder / WEIGHTS, b"{" + b",".join(entry % i for i in range(10**6)) + b"}")


@broken(rf"{WEIGHTS}: tensor '0' is unexpected: .*\(50000 such tensors: also '1', '2', …\)")
def many_tensors_of_nobody(folder: Path) -> None:
    entry = b'"%d":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}'
    entries = [entry % (i, 4 * i, 4 * i + 4) for i in range(50_000)]
    write_raw(folder / WEIGHTS, b"{" + b",".join(entries) + b"}", bytes(200_000))


@broken(rf"{WEIGHTS} has a header of 99999992 bytes; at most 16777216 are read")
def sparse_giant(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((99_999_992).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 1 << 40)


@broken(rf"the header of {WEIGHTS} is not valid JSON")
def garbage_header(folder: Path) -> None:
    write_raw(folder / WEIGHTS, b"<html>not found</html>")


@broken(rf"the header of {WEIGHTS} is not valid JSON: 'a' is there twice")
def tensor_twice(folder: Path) -> None:
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    write_raw(folder / WEIGHTS, b'{"a":' + entry + b',"a":' + entry + b"}", bytes(4))


@broken(rf"{WEIGHTS} is a git-lfs pointer, not the file: run `git lfs pull`")
def git_lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / WEIGHTS).write_text(text)


@broken(rf"{WEIGHTS} is not a regular file")
def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@broken(rf"{WEIGHTS}: tensor '{Q}' is I64; a weight is F32, F16, BF16")
def wrong_dtype(folder: Path) -> None:
    with_tensors(folder, **{Q: stored(folder)[Q].long()})


@broken(rf"{WEIGHTS}: tensor '{Q}' has the unknown dtype 'F23'")
def unknown_dtype(folder: Path) -> None:
    with_entry(folder, Q, dtype="F23")


@broken(rf"{WEIGHTS}: tensor '{Q}' has \d+ bytes, which is not F16 of shape \[64, 64\]")
def dtype_of_another_size(folder: Path) -> None:
    with_entry(folder, Q, dtype="F16")


@broken(rf"{WEIGHTS}: tensor '{Q}' has \d+ bytes, which is not F32 of shape")
def shape_of_another_size(folder: Path) -> None:
    with_entry(folder, Q, shape=[1 << 60, 1 << 60, 1 << 60])


@broken(rf"{WEIGHTS}: tensor '{Q}' has shape \[-64, -64\] at ")
def negative_shape(folder: Path) -> None:
    with_entry(folder, Q, shape=[-64, -64])


@broken(rf"{WEIGHTS}: tensor '{Q}' is not described by dtype, shape and data_offsets")
def no_description(folder: Path) -> None:
    with_entry(folder, Q, data_offsets=None)


@broken(rf"{WEIGHTS}: tensor '[a-z_.0-9]+' overlaps the tensor before it")
def overlap(folder: Path) -> None:
    with_entry(folder, Q, data_offsets=[8, 8 + 64 * 64 * 4])


@broken(rf"{WEIGHTS}: tensor 'x' ends at byte \d+, and the file has \d+: it is truncated")
def offsets_out_of_range(folder: Path) -> None:
    with_entry(folder, "x", dtype="F32", shape=[1], data_offsets=[1 << 50, (1 << 50) + 4])


@broken(rf"{WEIGHTS}: 5 bytes belong to no tensor")
def bytes_at_the_end(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"extra")


@broken(rf"{WEIGHTS}: tensor '[a-z_.0-9]+' follows a hole")
def hole(folder: Path) -> None:
    header, data = read_raw(folder / WEIGHTS)
    del header[Q]
    write_raw(folder / WEIGHTS, header, data)


@broken(rf"{WEIGHTS}: tensor '{Q}' is missing; of the network's 21 weights 1 is incomplete")
def missing_tensor(folder: Path) -> None:
    with_tensors(folder, **{Q: None})


@broken(rf"{WEIGHTS}: tensor 'model.embed_tokens.weight' is missing; of the network's 21 weights 1")
def missing_embedding(folder: Path) -> None:
    with_tensors(folder, **{"model.embed_tokens.weight": None})


@broken(
    rf"{WEIGHTS}: tensor 'model.layers.3.self_attn.k_proj.weight' is missing \(also .*\); .* 6 are"
)
def missing_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


@broken(
    rf"{WEIGHTS}: tensor 'model.embed_tokens.weight' is missing \(also .*; of .* 21 weights 21 are"
)
def no_tensors(folder: Path) -> None:
    write_raw(folder / WEIGHTS, b"{}")


@broken(rf"{WEIGHTS}: tensor 'lora_a' is unexpected: a llama has no such weight \(2 such tensors")
def unexpected_tensor(folder: Path) -> None:
    with_tensors(folder, lora_a=torch.ones(1), lora_b=torch.ones(1))


@broken(rf"{WEIGHTS}: tensor 'model.layers.2.*' is unexpected: .*\(9 such tensors: also")
def layer_too_many(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


@broken(rf"{WEIGHTS}: tensor '{Q}' has shape \[64, 32\], which does not fit layers.1.attention.qkv")
def wrong_shape(folder: Path) -> None:
    with_tensors(folder, **{Q: stored(folder)[Q][:, :32]})


@broken(rf"{WEIGHTS}: tensor '{DOWN}' has shape \[48, 64\], which does not fit layers.0.mlp.down")
def turned_shape(folder: Path) -> None:
    with_tensors(folder, **{DOWN: stored(folder)[DOWN].T})


@broken(rf"{WEIGHTS}: tensor 'lm_head.weight' has shape \[67, 64\], .* head.weight \[9999999, 64\]")
def absurd_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 9_999_999}))


@broken(rf"{WEIGHTS}: tensor '{Q}' holds NaN or infinity")
def nan(folder: Path) -> None:
    tensor = stored(folder)[Q]
    tensor[37, 41] = float("nan")  # anywhere: all is looked at
    with_tensors(folder, **{Q: tensor})


@broken(rf"{WEIGHTS}: tensor 'model.norm.weight' holds NaN or infinity")
def infinity(folder: Path) -> None:
    tensor = stored(folder)["model.norm.weight"]
    tensor[3] = -torch.inf
    with_tensors(folder, **{"model.norm.weight": tensor})


@broken(r"has only 'pytorch_model.bin', and Kvist reads .safetensors.*save_pretrained\('NEW'\)")
def only_code(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@broken(r"has no weights, and Kvist reads .safetensors")
def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@broken(rf"has 2 .safetensors files and no {INDEX} that names them")
def shards_without_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


@broken(rf"{SHARD}.*.safetensors is missing, and tensor '.*' should be in it")
def missing_shard(folder: Path) -> None:
    shard(folder)
    next(folder.glob(SHARD + "*")).unlink()


@broken(rf"{SHARD}.*.safetensors is truncated, or not a safetensors file")
def truncated_shard(folder: Path) -> None:
    shard(folder)
    os.truncate(next(folder.glob(SHARD + "*")), 64)


@broken(rf"{INDEX}: tensor '{Q}' is said to be in '../../etc/x.safetensors', which is not")
def shard_elsewhere(folder: Path) -> None:
    with_index(folder, lambda names: names.update({Q: "../../etc/x.safetensors"}))


@broken(rf"{INDEX}: tensor '{Q}' is said to be in \['a'\], which is not")
def shard_that_is_no_name(folder: Path) -> None:
    with_index(folder, lambda names: names.update({Q: ["a"]}))


@broken(rf"model-00001-of-.*: tensor '{Q}' is missing, and {INDEX} says that it is there")
def tensor_in_another_shard(folder: Path) -> None:
    def lie(names: dict[str, str]) -> None:
        names[Q] = min(names.values())

    with_index(folder, lie)


@broken(rf"b.safetensors: tensor '{Q}' is also in a.safetensors")
def tensor_in_two_shards(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    safetensors.torch.save_file({Q: torch.ones(64, 64)}, folder / "b.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", Q: "b.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


@broken(rf"{INDEX}: weight_map is not an object")
def index_without_map(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / INDEX).write_text("{}")


@pytest.fixture
def at_most_a_minute() -> Iterator[None]:
    """The promise of the reliability contract; in truth each takes milliseconds."""

    def stop(*_: object) -> None:
        raise TimeoutError("refusing took more than 60 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def peak_memory(reset: bool = False) -> int:
    """The most resident bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(name: str, folder: Path, at_most_a_minute: None) -> None:
    breaks, sentence = BROKEN[name]
    breaks(folder)
    before = peak_memory(reset=True)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(folder, dtype="float32")
    assert peak_memory() - before < 100 << 20
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 1000


def test_a_weight_too_large_for_its_dtype_is_refused(folder: Path) -> None:
    with_tensors(folder, **{Q: stored(folder)[Q] * 1e6})
    load(folder, dtype="float32")
    with pytest.raises(CheckpointError, match=rf"'{Q}' holds .* too large for torch.float16"):
        load(folder, dtype="float16")


def test_of_several_faults_the_largest_tensors_is_told(folder: Path) -> None:
    """Whichever of the threads was first."""
    with_tensors(folder, **{name: stored(folder)[name] * torch.nan for name in (Q, DOWN)})
    for _ in range(8):
        with pytest.raises(CheckpointError, match=rf"'{Q}' holds NaN"):
            load(folder, dtype="float32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_number_is_rounded_to_one(value: float, folder: Path) -> None:
    tensor = stored(folder)[DOWN]
    tensor[5, 7] = value
    with_tensors(folder, **{DOWN: tensor})
    with pytest.raises(CheckpointError, match=rf"'{DOWN}' holds NaN or infinity"):
        load(folder, dtype="float32", quantization="int8", group=16)


def test_a_second_name_for_the_same_weight_is_refused(tmp_path: Path) -> None:
    make("gpt2", tmp_path)
    tensors = stored(tmp_path)
    tensors["wte.weight"] = tensors["transformer.wte.weight"].clone()
    save(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="fills the same weights as"):
        load(tmp_path)


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    tensors = stored(tmp_path)
    name = next(name for name in tensors if "experts.0." in name)
    tensors[name.replace("experts.0.", "experts.4.")] = tensors[name].clone()
    save(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"experts\.4\..*does not fit layers\.\d\.mlp\."):
        load(tmp_path)


def test_too_little_memory_is_said_with_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "free_memory", lambda device: 1000)
    with pytest.raises(CheckpointError, match=r"need 0\.0 GB and cpu has 0\.0 GB free: try --quan"):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    file = TensorFile(folder / WEIGHTS)
    os.truncate(folder / WEIGHTS, 4096)
    with pytest.raises(CheckpointError, match=rf"'{Q}' cannot be read any more"):
        file.read(Q)


# ── the file format, against the library ──────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reading_equals_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = [(), (1,), (0, 3), (5000,), (33, 7), (2, 3, 4)]
    tensors = {f"{i} ä\n": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    file = TensorFile(path)
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.dtype(name) == dtype
        assert torch.equal(file.read(name), tensor)


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}})
    for spaces in range(8):
        path = tmp_path / f"{spaces}.safetensors"
        write_raw(path, header.encode() + b" " * spaces, values.tobytes())
        assert TensorFile(path).read("x").tolist() == values.tolist()


def test_all_dtypes_have_the_size_that_the_library_thinks(tmp_path: Path) -> None:
    for dtype, bits in BITS.items():
        entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
        write_raw(tmp_path / "x.safetensors", {"x": entry}, bytes(bits))
        with safetensors.safe_open(tmp_path / "x.safetensors", "np") as theirs:
            assert theirs.get_slice("x").get_dtype() == dtype
        TensorFile(tmp_path / "x.safetensors")


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}


@given(
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 40),
)
@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(
    edits: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, HEADER, bytes(range(32)))
    whole = bytearray(path.read_bytes())
    for at, byte in edits:
        if at < len(whole):
            whole[at] = byte
    path.write_bytes(whole[: len(whole) - max(0, cut - 30)])
    try:
        file = TensorFile(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == file.tensors.keys()
        for name, entry in file.tensors.items():
            if entry.dtype in WEIGHT_DTYPES:
                one, other = file.read(name), theirs.get_tensor(name)
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert torch.equal(
                    one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
                )


ENTRY = st.tuples(
    st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "F23"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([0, 0, 0, 0, 1, -1, 4, -4, 1 << 62, 1 << 64]),  # how wrong its beginning is
    st.sampled_from([0, 0, 0, 0, 1, -1, 4, -4, 1 << 62, 1 << 64]),  # and its end
)


@given(entries=st.lists(ENTRY, max_size=4), extra=st.sampled_from([0, 0, 0, 1, -1, 8]))
@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_header_is_accepted_when_the_library_accepts_it(
    entries: list[tuple[str, list[int], int, int]], extra: int, tmp_path: Path
) -> None:
    header, at = {}, 0
    for i, (dtype, shape, early, late) in enumerate(entries):
        size = math.prod(shape) * BITS.get(dtype, 8) // 8
        offsets = [at + early, at + size + late]
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at += size
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(max(0, at + extra)))

    def accepts(read: Callable[[Path], object], error: type[Exception]) -> bool:
        try:
            read(path)
        except error:
            return False
        return True

    theirs = accepts(lambda path: safetensors.safe_open(path, "pt"), safetensors.SafetensorError)
    assert accepts(TensorFile, CheckpointError) == theirs


# ── memory ────────────────────────────────────────────────────────────────────────────────────

MEASURE = """
import sys
from pathlib import Path
import torch
from model.weights import load

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
for dtype, quantization in (("bfloat16", "none"), ("float32", "none"), ("bfloat16", "int8")):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    decoder = load(Path(sys.argv[1]), dtype=dtype, quantization=quantization)
    print(dtype, quantization, status("VmHWM") - before)
    del decoder
"""


def make_large(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """A llama of noise in bfloat16; returns the bytes of its largest tensor."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    noise = torch.randn(1 << 16, dtype=torch.bfloat16)
    tensors = {
        name: noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape.shape)
        for name, shape in shapes.items()
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    config.save_pretrained(folder)
    return max(tensor.nbytes for tensor in tensors.values())


def check_memory(folder: Path, largest: int, spare: int) -> None:
    """Peak ≤ model + largest tensor + a little, over what importing torch and Triton takes."""
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size = (folder / WEIGHTS).stat().st_size
    decoder = load(folder, dtype="bfloat16")
    rounded = sum(decoder.get_parameter(name).nbytes for name in chosen(decoder))
    models = [size, 2 * size, size - rounded / 2]
    for model, line in zip(models, done.stdout.splitlines(), strict=True):
        peak = int(line.split()[-1])
        assert 0.9 * model < peak <= model + largest + spare, line


def test_memory_of_a_small_model(tmp_path: Path) -> None:
    """With less to spare than the model is large, so that one held twice would show."""
    largest = make_large(tmp_path, layers=6, width=768, vocabulary=16_000)
    check_memory(tmp_path, largest, spare=20 << 20)


@pytest.mark.slow
def test_memory_of_a_large_model(tmp_path: Path) -> None:
    largest = make_large(tmp_path, layers=10, width=1536, vocabulary=32_000)
    check_memory(tmp_path, largest, spare=20 << 20)
