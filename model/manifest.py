"""Which tensor of which file goes where, settled and checked on headers alone.

Whatever is missing, unexpected, twice there, or of a wrong shape or dtype is found here, before
a single weight is read.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Size

from model.checkpoint import CheckpointError, describe, read_json, short
from model.config import ModelConfig
from model.decoder import Decoder
from model.family import Family, Place
from model.tensorfile import TensorFile

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 32 << 20  # a trillion parameters in 140,000 tensors make 13 MB
TENSORS = 1 << 18  # of a checkpoint, in all its files; a trillion parameters have 140,000
SHOWN = 3  # names in an error
CODE = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (
    "from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained('FOLDER').save_pretrained('NEW')"
)


@dataclass(frozen=True)
class Move:
    """One tensor, and where it goes."""

    file: TensorFile
    name: str
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.name].shape

    @property
    def bytes(self) -> int:
        return self.file.tensors[self.name].bytes

    def wrong(self, what: str) -> CheckpointError:
        return self.file.wrong(self.name, what)


@dataclass(frozen=True)
class Manifest:
    name: str  # of the file, or of the index of the files
    family: Family
    config: ModelConfig
    moves: list[Move]  # in the order of the files, so that they are read from front to back

    @property
    def dtype(self) -> torch.dtype:
        """Of the largest weight: small ones are often kept in more bits."""
        largest = max(self.moves, key=lambda move: move.bytes, default=None)
        return largest.file.dtype(largest.name) if largest else torch.float32


def read_manifest(folder: Path) -> Manifest:
    family, config = describe(folder)
    files = _open(folder)
    name = INDEX if len(files) > 1 else files[0].path.name
    return _settle_head(Manifest(name, family, config, _moves(family, config, files)))


def check(manifest: Manifest, decoder: Decoder) -> None:
    """Every tensor has its place and its shape, and every place is filled once."""
    shapes = {name: weight.shape for name, weight in decoder.named_parameters()}
    moves = manifest.moves
    strangers = [(move.file, move.name) for move in moves if move.place.name not in shapes]
    _refuse(strangers, manifest.config)
    filled: dict[str, Move] = {}
    for move in moves:
        _check_shape(move, shapes[move.place.name])
        part = f"{move.place.name} {move.place.index} {move.place.rows}"
        if (twin := filled.setdefault(part, move)) is not move:
            raise move.wrong(f"fills the same weights as {short(twin.name)}")
    _check_whole(manifest, shapes)


# ── which files hold the weights ──────────────────────────────────────────────────────────────


def _open(folder: Path) -> list[TensorFile]:
    files, where = [], dict[str, str]()
    for path, promised in _weight_files(folder).items():
        file = TensorFile(path)
        for name in promised:
            if name not in file.tensors:
                raise file.wrong(name, f"is missing, and {INDEX} says that it is there")
        for name in file.tensors:
            if where.setdefault(name, path.name) != path.name:
                raise file.wrong(name, f"is also in {where[name]}")
        if len(where) > TENSORS:
            raise CheckpointError(f"{folder} has more than {TENSORS} tensors")
        files.append(file)
    return files


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files, and which tensors an index promises to be in each."""
    if (folder / WHOLE).exists():
        return {folder / WHOLE: []}
    if (folder / INDEX).exists():
        return _shards(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has {len(found)} .safetensors files and no {INDEX} that names them"
        )
    if not found:
        raise CheckpointError(_no_weights(folder))
    return {found[0]: []}


def _no_weights(folder: Path) -> str:
    code = [path.name for path in sorted(folder.iterdir()) if path.suffix in CODE]
    having = f"only {short(code[0])}" if code else "no weights"
    return (
        f"{folder} has {having}, and Kvist reads .safetensors. Files such as .bin and .pt can run "
        f"code when they are opened, so they never are; convert them once, where you trust them: "
        f'python -c "{CONVERT}"'
    )


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Only plain file names: an index must not lead out of its folder."""
    names = read_json(folder / INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{INDEX}: weight_map is not an object of names and files")
    shards: dict[Path, list[str]] = defaultdict(list)
    for tensor, shard in names.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise CheckpointError(
                f"{INDEX}: tensor {short(tensor)} is said to be in {short(shard)}, which is not "
                "the name of a .safetensors file in the same folder"
            )
        shards[folder / shard].append(tensor)
    for path, tensors in shards.items():
        if not path.exists():
            raise CheckpointError(
                f"{path.name} is missing, and tensor {short(tensors[0])} should be in it ({INDEX})"
            )
    return dict(sorted(shards.items()))


# ── where each tensor goes ────────────────────────────────────────────────────────────────────


def _moves(family: Family, config: ModelConfig, files: list[TensorFile]) -> list[Move]:
    moves: list[Move] = []
    unexpected: list[tuple[TensorFile, str]] = []
    for file in files:
        for name in file.tensors:
            try:
                place = family.place(name, config)
            except (LookupError, ValueError):  # no such name, or no such layer
                unexpected.append((file, name))
                continue
            if place is not None:
                file.dtype(name)  # or it is no weight
                moves.append(Move(file, name, place))
    _refuse(unexpected, config)
    return moves


def _refuse(unexpected: Sequence[tuple[TensorFile, str]], config: ModelConfig) -> None:
    if unexpected:
        file, name = unexpected[0]
        more = _more([name for _, name in unexpected])
        raise file.wrong(name, f"is unexpected: a {config.family} has no such weight{more}")


def _more(names: list[str]) -> str:
    """The rest of a list whose first is named already."""
    if len(names) == 1:
        return ""
    others = ", ".join(map(short, names[1:SHOWN]))
    return f" ({len(names)} such tensors: also {others}{', …' if len(names) > SHOWN else ''})"


def _settle_head(manifest: Manifest) -> Manifest:
    """A tied head may be in the file too, or instead of the embedding, or be a different one."""
    named = {move.place.name: move for move in manifest.moves}
    head, embed = named.get("head.weight"), named.get("embed.weight")
    if not manifest.config.tied or head is None:
        return manifest
    if embed is not None and not _equal(head, embed):
        apart = dataclasses.replace(manifest.config, tied=False)
        return dataclasses.replace(manifest, config=apart)
    moves = [move for move in manifest.moves if move is not head]
    if embed is None:
        there = dataclasses.replace(head.place, name="embed.weight")
        moves.append(dataclasses.replace(head, place=there))
    return dataclasses.replace(manifest, moves=moves)


def _equal(one: Move, other: Move) -> bool:
    if one.file.dtype(one.name) != other.file.dtype(other.name):
        return False
    return torch.equal(one.file.read(one.name), other.file.read(other.name))


# ── whether it fits ───────────────────────────────────────────────────────────────────────────


def _check_shape(move: Move, whole: Size) -> None:
    """The shape after its change, which runs on a shape without memory, is that of its part."""
    part = torch.empty(whole, device="meta")
    place = move.place
    try:
        if place.index is not None:
            part = part[place.index]
        if place.rows is not None:
            part = part[place.rows]
        found = torch.empty(move.shape, device="meta")
        if place.change is not None:
            found = place.change(found)
        fits = found.shape == part.shape
    except (RuntimeError, IndexError):  # an expert too many; heads that cannot be parted
        fits = False
    if not fits:
        raise move.wrong(
            f"has shape {list(move.shape)}, which does not fit {place.name} {list(whole)}"
        )


def _check_whole(manifest: Manifest, shapes: dict[str, Size]) -> None:
    counts: dict[str, int] = defaultdict(int)
    for move in manifest.moves:
        counts[move.place.name] += math.prod(move.shape)
    holes = [name for name, shape in shapes.items() if counts[name] < shape.numel()]
    if holes:
        absent = [short(name) for hole in holes[:SHOWN] for name in _absent(hole, manifest)]
        also = f" (also {', '.join(absent[1:SHOWN])})" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{manifest.name}: tensor {absent[0]} is missing{also}; of the network's "
            f"{len(shapes)} weights {len(holes)} {'is' if len(holes) == 1 else 'are'} incomplete"
        )


def _absent(parameter: str, manifest: Manifest) -> list[str]:
    """What the file would call the missing tensors: as in a layer that has them, or else as the
    family's table does."""
    present = {move.name for move in manifest.moves}
    layer, rest = _parted(parameter)
    names = set()
    for move in manifest.moves:
        other, there = _parted(move.place.name)
        if layer and other and there == rest:
            names.add(re.sub(rf"(?<!\d){other}(?!\d)", layer, move.name, count=1))
    return sorted(names - present) or [_called(layer, rest, manifest.family)]


def _parted(parameter: str) -> tuple[str, str]:
    """layers.7.mlp.up.weight -> 7, layers.{i}.mlp.up.weight"""
    layer = re.match(r"layers\.(\d+)\.", parameter)
    return (layer[1], "layers.{i}." + parameter[layer.end() :]) if layer else ("", parameter)


def _called(layer: str, parameter: str, family: Family) -> str:
    stem, _, kind = parameter.rpartition(".")
    for source, target in family.names.items():
        if target.split()[0] in (parameter, f"{stem}.*"):
            return source.replace("{i}", layer).replace("*", kind)
    return parameter.replace("{i}", layer)
