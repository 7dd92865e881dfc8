"""Weights in fewer bits in the place of float ones: applied to a decoder from outside.

The products inside the layers are rounded, by output channel or by groups of a row. What stays
float is small, or its error costs more than its bytes: embedding, head, norms, biases, routers,
and the stacks of experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import memory
from kernels.linear import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Quantised,
    Weight,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from model.decoder import Decoder, Linear

Quantize = Literal["none", "int8", "int4", "fp8"]

PIECE = 1 << 18  # weights rounded at once: their float32 copies stay in the cache, measured 10×


@dataclass(frozen=True)
class Format:
    room: Callable[[Tensor, Tensor], Quantised]
    round: Callable[[Tensor, int], Quantised]  # a weight by so many groups of a row
    values: torch.dtype
    bits: int
    groups: tuple[int, ...] = ()  # weights a scale, unless told: the first that divides a row


FORMATS = {
    "int8": Format(Int8Weight, quantize_int8, torch.int8, 8),
    "int4": Format(Int4Weight, quantize_int4, torch.uint8, 4, (128, 64, 32)),
    "fp8": Format(Fp8Weight, quantize_fp8, torch.float8_e4m3fn, 8),
}


def chosen(decoder: Decoder) -> Iterator[str]:
    """Names of the weights that are rounded."""
    for name, module in decoder.named_modules():
        routes = name.endswith((".router", ".shared_gate"))
        if isinstance(module, Linear) and name.startswith("layers.") and not routes:
            yield f"{name}.weight"


def head_name(decoder: Decoder) -> str:
    """The weight of the last product, which may be the embedding's own."""
    return "embed.weight" if decoder.head is None else "head.weight"


def count(decoder: Decoder) -> int:
    """Weights, in however few bits."""
    found = sum(weight.numel() for weight in decoder.parameters())
    for module in decoder.modules():
        for weight in vars(module).values():
            if isinstance(weight, Quantised):
                bits = next(form.bits for form in FORMATS.values() if form.room is type(weight))
                found += weight.values.nbytes * 8 // bits
    return found


def quantize(decoder: Decoder, kind: str, group: int = 0) -> None:
    """Rounds a decoder whose weights are loaded, each matrix before the next."""
    for name in list(chosen(decoder)):
        put(decoder, name, rounded(decoder.get_parameter(name).detach(), kind, group))


def rounded(weight: Tensor, kind: str, group: int = 0) -> Quantised:
    room = empty(weight.shape, kind, group, weight.device)
    fill(room, slice(None), weight)
    return room


def empty(shape: torch.Size, kind: str, group: int, device: torch.device | str) -> Quantised:
    """Room for a weight [out, in], with a scale for each `group` weights of a row (0: the usual)"""
    out, inner = shape
    form = FORMATS[kind]
    group = group or next((size for size in form.groups if inner % size == 0), inner)
    odd = form.bits == 4 and group % 2
    if inner % group or odd:
        why = ": two weights share a byte" if odd else ""
        raise ValueError(f"rows of {inner} weights cannot be cut into groups of {group}{why}")
    return form.room(
        memory.empty((out, inner * form.bits // (8 * form.values.itemsize)), form.values, device),
        memory.empty((out, inner // group), torch.float32, device),
    )


def fill(room: Quantised, rows: slice, weight: Tensor) -> None:
    """Rounds `weight` into these rows of the room, on its device, piece by piece."""
    values, scales = room.values[rows], room.scales[rows]
    form = next(form for form in FORMATS.values() if form.room is type(room))
    step = max(1, PIECE // weight.shape[1])
    for at in range(0, len(weight), step):
        floats = weight[at : at + step].to(values.device).contiguous()
        piece = form.round(floats, scales.shape[1])
        values[at : at + step] = piece.values
        scales[at : at + step] = piece.scales


def put(decoder: Decoder, name: str, weight: Weight) -> None:
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    delattr(module, leaf)  # a parameter would refuse to become anything but a parameter
    setattr(module, leaf, weight)
