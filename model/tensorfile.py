"""A .safetensors file, read with suspicion: nothing in it is believed before it is checked.

    8 bytes   size of the header, little-endian
    header    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …}
    data      the tensors one after another, without holes

The safetensors library keeps every page that it has read until the file is closed, 5 GB for a
usual shard, and parses headers of 100 MB. Here a tensor's pages go when the tensor goes.
"""

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import CheckpointError, parse_json, read_head, short

HEADER_BYTES = 16 << 20  # about 150,000 tensors; the largest single files in use have 5,000
SIZES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
BITS = {dtype: bits for bits, dtypes in SIZES.items() for dtype in dtypes.split()}
WEIGHTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor, as the header says and the checks allow."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


class TensorFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.size, data, header = _header(path)
        header.pop("__metadata__", None)
        found = [self._stored(name, entry, data) for name, entry in header.items()]
        found.sort(key=lambda stored: (stored.start, stored.end))
        self._check_whole(found, data)
        self.tensors = {stored.name: stored for stored in found}

    def wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: tensor {short(name)} {what}")

    def dtype(self, name: str) -> torch.dtype:
        stored = self.tensors[name]
        if stored.dtype not in WEIGHTS:
            raise self.wrong(name, f"is {stored.dtype}; a weight is {', '.join(WEIGHTS)}")
        return WEIGHTS[stored.dtype]

    def read(self, name: str) -> Tensor:
        """A view of the file (writable, but what is written stays here); its pages go with it."""
        stored, dtype = self.tensors[name], self.dtype(name)
        if not stored.bytes:
            return torch.empty(stored.shape, dtype=dtype)
        skip = stored.start % mmap.ALLOCATIONGRANULARITY
        pages = self._map(stored, skip)
        count = math.prod(stored.shape)
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=skip).view(stored.shape)

    def _map(self, stored: Stored, skip: int) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(
                    file.fileno(),
                    stored.bytes + skip,
                    access=mmap.ACCESS_COPY,
                    offset=stored.start - skip,
                )
        except (OSError, ValueError) as error:
            raise self.wrong(stored.name, f"cannot be read any more: {error}") from error

    def _stored(self, name: str, entry: Any, data: int) -> Stored:
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
                if not (_sizes(shape) and len(shape) <= 8 and _sizes((start, end))):
                    raise self.wrong(name, f"has shape {short(shape)} at {short([start, end])}")
            case _:
                raise self.wrong(name, "is not described by dtype, shape and data_offsets")
        if dtype not in BITS:
            raise self.wrong(name, f"has the unknown dtype {short(dtype)}")
        if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
            raise self.wrong(
                name, f"has {end - start} bytes, which is not {dtype} of shape {short(shape)}"
            )
        if data + end > self.size:
            raise self.wrong(
                name,
                f"ends at byte {data + end}, and the file has {self.size}: it is truncated",
            )
        return Stored(name, dtype, tuple(shape), data + start, data + end)

    def _check_whole(self, found: list[Stored], data: int) -> None:
        """Every byte belongs to exactly one tensor."""
        at = data
        for stored in found:
            if stored.start != at:
                how = "overlaps the tensor before it" if stored.start < at else "follows a hole"
                raise self.wrong(stored.name, f"{how}: it begins at {stored.start}, expected {at}")
            at = stored.end
        if at != self.size:
            raise CheckpointError(f"{self.path.name}: {self.size - at} bytes belong to no tensor")


def _sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """-> size of the file, where data begins, the header."""
    size, first = read_head(path, 8)
    length = int.from_bytes(first, "little")
    if first.startswith(b"version "):
        raise CheckpointError(f"{path.name} is a git-lfs pointer, not the file: run `git lfs pull`")
    if size < 8:
        raise CheckpointError(
            f"{path.name} is not a safetensors file: it has {size} bytes, and the size of the "
            "header takes 8"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path.name} is truncated, or not a safetensors file: it has {size} bytes, and its "
            f"header alone claims {length}"
        )
    if length > HEADER_BYTES:
        raise CheckpointError(
            f"{path.name} has a header of {length} bytes; at most {HEADER_BYTES} are read"
        )
    _, head = read_head(path, 8 + length)
    return size, 8 + length, parse_json(head[8:], f"the header of {path.name}")
