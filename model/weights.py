"""Weights from disk into a decoder: stream → rename → quantise → assign; nothing left over,
nothing missing, and every one of them a number.

The decoder is built as shapes without memory and checked against the manifest. Then each tensor
is mapped, copied straight to where it stays, checked, and unmapped: memory never holds more than
the model and one tensor for each core.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from kernels.linear import Quantised
from kernels.memory import empty
from model import quantize
from model.checkpoint import CheckpointError
from model.config import ModelConfig
from model.decoder import Decoder
from model.device import cores, free_memory, pick_dtype
from model.manifest import Manifest, Move, check, read_manifest

BAR = 256 << 20  # bytes from which a progress bar is worth showing

Room = Tensor | Quantised


def load(
    folder: Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    quantization: quantize.Quantize = "none",
    group: int = 0,
    head: bool = False,
    keep: bool = False,
    context: int = 0,
) -> Decoder:
    """The decoder of a checkpoint.

    dtype: a format or its name; "auto" keeps what is stored where the device is good at it.
    group: a quantised row has a scale for each `group` weights; 0: as suits the format.
    head: its weight becomes int8 too, which only the CPU's own kernels can look up again.
    keep: what is multiplied by or looked up stays in the 16 bits in which it is stored, where that
        changes no number: as float32 it would be twice as much to read. Needs the same kernels.
    context: the longest text that will be served; 0: the model's own.
    """
    if quantization not in ("none", *quantize.FORMATS):
        known = ", ".join(("none", *quantize.FORMATS))
        raise ValueError(f"quantization {quantization!r} is not known; expected one of {known}")
    device = torch.device(device)
    manifest = read_manifest(folder)
    _check_context(manifest.config, context)
    if isinstance(dtype, str):
        dtype = pick_dtype(dtype, device, manifest.dtype)
    decoder = build(manifest.config, dtype, device, context)
    check(manifest, decoder)
    if keep and dtype == torch.float32:
        _keep(decoder, manifest)
    kinds: dict[str, str] = {}
    if quantization != "none":
        kinds = dict.fromkeys(quantize.chosen(decoder), quantization)
        kinds |= {quantize.head_name(decoder): "int8"} if head else {}
    _check_memory(decoder, kinds, device)
    rooms = _furnish(decoder, kinds, group, device)
    _pour(rooms, manifest.moves, device)
    return decoder


# ── the decoder without its weights ───────────────────────────────────────────────────────────


class _Shapes(TorchFunctionMode):
    """A weight begins as `torch.empty`, a table of positions is computed. In this mode the former
    are shapes without memory, of the dtype asked for unless they name their own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is nn.init.normal_:  # how nn.Embedding begins; on meta, 150 MB of imports
            return None
        if function is torch.empty:
            kwargs |= {"device": "meta", "dtype": kwargs.get("dtype") or self.dtype}
        return function(*args, **kwargs)


def _check_context(config: ModelConfig, context: int) -> None:
    """Rotations go on for ever. A table of places does not: on a GPU, the first token behind its
    end would take the whole engine with it."""
    tabled = config.positions == "learned" or config.positions.startswith("sinusoidal")
    if tabled and context > config.context:
        raise CheckpointError(
            f"--context is {context}, but this model has places for {config.context} tokens and no "
            "more: ask for at most as many"
        )


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device, context: int) -> Decoder:
    """A decoder whose tables are there and whose weights are on the meta device."""
    try:
        with _Shapes(dtype):
            decoder = Decoder(config, context)
    except Exception as error:  # a stranger's numbers, which no network can have
        raise CheckpointError(f"config.json describes no network: {error!r}") from error
    for module in decoder.modules():
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(device))
    return decoder


def _keep(decoder: Decoder, manifest: Manifest) -> None:
    """Shapes become those of what is stored, if all of a weight is stored alike."""
    stored: dict[str, set[torch.dtype]] = {}
    for move in manifest.moves:
        stored.setdefault(move.place.name, set()).add(move.file.dtype(move.name))
    for name in {*quantize.chosen(decoder), quantize.head_name(decoder), "embed.weight"}:
        dtype, *others = stored[name]
        if not others and dtype in (torch.bfloat16, torch.float16):
            weight = decoder.get_parameter(name)
            weight.data = weight.data.to(dtype)


def _check_memory(decoder: Decoder, kinds: Mapping[str, str], device: torch.device) -> None:
    """Said now, with numbers, instead of dying in the middle."""
    bits = sum(
        weight.numel()
        * (quantize.FORMATS[kinds[name]].bits if name in kinds else 8 * weight.itemsize)
        for name, weight in decoder.named_parameters()
    )
    need = bits // 8
    have = free_memory(device)
    if need > have:
        raise CheckpointError(
            f"the weights need {need / 1e9:.1f} GB and {device} has {have / 1e9:.1f} GB free: "
            "try --quantize int8, a smaller --dtype, or a smaller model"
        )


def _furnish(
    decoder: Decoder, kinds: Mapping[str, str], group: int, device: torch.device
) -> dict[str, Room]:
    """Room for every weight, and in the decoder. Memory that is not written is not yet taken."""
    rooms: dict[str, Room] = {}
    for name, shape in list(decoder.named_parameters()):
        if name in kinds:
            rooms[name] = _small_room(decoder, name, shape, kinds[name], group, device)
            continue
        rooms[name] = weight = empty(shape.shape, shape.dtype, device)
        owner, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return rooms


def _small_room(
    decoder: Decoder, name: str, shape: Tensor, kind: str, group: int, device: torch.device
) -> Quantised:
    try:
        room = quantize.empty(shape.shape, kind, group, device)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot become {kind}: {error}") from error
    quantize.put(decoder, name, room)
    return room


# ── a tensor to its place ─────────────────────────────────────────────────────────────────────


def _pour(rooms: Mapping[str, Room], moves: list[Move], device: torch.device) -> None:
    """Each core takes the next tensor. The largest come first: what is mapped counts as this
    process's memory, and then only small ones are mapped when all else is full."""
    moves = sorted(moves, key=lambda move: -move.bytes)
    inference = torch.is_inference_mode_enabled()  # which other threads are not told

    def fill(move: Move) -> None:
        with torch.inference_mode(inference):
            _fill(rooms[move.place.name], move)

    with ThreadPoolExecutor(cores() if device.type == "cpu" else 1) as crowd:
        under_way = [crowd.submit(fill, move) for move in moves]
        try:
            for _, one in zip(_shown(moves), under_way, strict=True):
                one.result()
        except BaseException:
            crowd.shutdown(cancel_futures=True)
            raise


def _shown(moves: list[Move]) -> Iterator[Move]:
    total = sum(move.bytes for move in moves)
    off = True if total < BAR else None  # None: off unless there is a terminal
    with tqdm(desc="weights", total=total, unit="B", unit_scale=True, disable=off) as bar:
        for move in moves:
            yield move
            bar.update(move.bytes)


def _fill(room: Room, move: Move) -> None:
    tensor = move.file.read(move.name)
    change = move.place.change or (lambda same: same)
    if isinstance(room, Tensor):
        part = room if move.place.index is None else room[move.place.index]
        part = part if move.place.rows is None else part[move.place.rows]
        stacked = tensor.ndim == 3  # one expert at a time, as a change may copy what it is given
        for source, target in zip(tensor.split(1), part.split(1)) if stacked else [(tensor, part)]:
            target.copy_(change(source))
    else:
        rows = slice(None) if move.place.rows is None else move.place.rows
        quantize.fill(room, rows, change(tensor))
        part = room.scales[rows]  # a scale is the largest weight of its group: NaN if one is
    if not _finite(part):
        raise move.wrong(f"holds NaN or infinity, or is too large for {part.dtype}")


def _finite(part: Tensor) -> bool:
    """All of it, not a sample: in one pass over what is just written, 30 % of the copy's time."""
    if not part.numel():
        return True
    least, most = torch.aminmax(part)
    return bool(torch.isfinite(least) & torch.isfinite(most))
