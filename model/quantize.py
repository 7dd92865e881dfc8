"""Int8 weights in the place of float ones: applied to a decoder from outside.

The products inside the layers become int8, by output channel or by groups of a row. What stays
float is small, or its error costs more than its bytes: embedding, head, norms, biases, routers,
and the stacks of experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.linear import Int8Weight, Weight, quantize_int8
from model import memory
from model.decoder import Decoder, Linear

PIECE = 1 << 18  # weights rounded at once: their float32 copies stay in the cache, measured 10×


def chosen(decoder: Decoder) -> Iterator[str]:
    """Names of the weights that become int8."""
    for name, module in decoder.named_modules():
        routes = name.endswith((".router", ".shared_gate"))
        if isinstance(module, Linear) and name.startswith("layers.") and not routes:
            yield f"{name}.weight"


def quantize(decoder: Decoder, group: int = 0) -> None:
    """Rounds a decoder whose weights are loaded, each matrix before the next."""
    for name in list(chosen(decoder)):
        weight = decoder.get_parameter(name)
        room = empty(weight.shape, group, weight.device)
        fill(room, slice(None), weight.detach())
        put(decoder, name, room)


def empty(shape: torch.Size, group: int, device: torch.device | str) -> Int8Weight:
    """Room for a weight [out, in], with a scale for each `group` weights of a row (0: a row)."""
    out, inner = shape
    group = group or inner
    if inner % group:
        raise ValueError(f"rows of {inner} weights cannot be cut into groups of {group}")
    return Int8Weight(
        memory.empty((out, inner), torch.int8, device),
        memory.empty((out, inner // group), torch.float32, device),
    )


def fill(room: Int8Weight, rows: slice, weight: Tensor) -> None:
    """Rounds `weight` into these rows of the room, on its device, piece by piece."""
    values, scales = room.values[rows], room.scales[rows]
    step = max(1, PIECE // weight.shape[1])
    for at in range(0, len(weight), step):
        floats = weight[at : at + step].to(values.device).contiguous()
        piece = quantize_int8(floats, scales.shape[1])
        values[at : at + step] = piece.values
        scales[at : at + step] = piece.scales


def put(decoder: Decoder, name: str, weight: Weight) -> None:
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    delattr(module, leaf)  # a parameter would refuse to become anything but a parameter
    setattr(module, leaf, weight)
