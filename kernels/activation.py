"""Pointwise activations, alone or multiplied with the other half of a gated MLP.

activate:  y = f(x)
gate:      y = f(gate) · up, of x = gate | up
swigluoai (gpt-oss): g = min(gate, limit), u = clamp(up, ±limit), y = (u + 1) · g · sigmoid(1.702 g)
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Call, Kernel, Probe, launch, tl, triton
from kernels.config import Config, Key, configured, runs

SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
KINDS = (*SIMPLE, "swigluoai")  # of gate; a kernel knows a kind by its place here

CONFIGS: dict[
    Key, Config
] = {  # numbers a program writes: with 4 warps, one load of 16 bytes a lane
    ("activate",): Config(1024, 4),
    ("gate",): Config(1024, 4),
}


def activate_reference(x: Tensor, kind: str) -> Tensor:
    return SIMPLE[kind](x)


def gate_reference(x: Tensor, kind: str, limit: float = 0.0) -> Tensor:
    gate, up = x.chunk(2, -1)
    if kind != "swigluoai":
        return SIMPLE[kind](gate) * up
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@triton.jit
def apply(x, KIND: tl.constexpr):
    """The activation of float32 numbers. KIND is a place in SIMPLE."""
    if KIND == 0:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 1:  # tanh(z) is 2 · sigmoid(2z) − 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 2:
        y = tl.maximum(x, 0.0)
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def apply_gate(gate, up, limit, KIND: tl.constexpr):
    """f(gate) · up in float32. KIND is a place in KINDS."""
    if KIND == 4:
        if limit > 0:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        y = (up + 1.0) * gate * tl.sigmoid(1.702 * gate)
    else:
        y = apply(gate, KIND) * up
    return y


@triton.jit
def _activate(x, y, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = apply(tl.load(x + at, at < count, other=0.0).to(tl.float32), KIND)
    tl.store(y + at, found.to(y.dtype.element_ty), at < count)


@triton.jit
def _gate(x, y, width, limit, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, inside, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * width + column, inside, other=0.0).to(tl.float32)
    found = apply_gate(gate, up, limit, KIND)
    tl.store(y + row * width + column, found.to(y.dtype.element_ty), inside)


def _launch_activate(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        config = configured(CONFIGS, x.device, "activate")
        sizes = {"KIND": KINDS.index(kind), "BLOCK": config.block}
        launch(_activate, (triton.cdiv(count, config.block),), x, y, count, **sizes, **runs(config))
    return y


def _launch_gate(x: Tensor, kind: str, limit: float = 0.0) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel():
        config = configured(CONFIGS, x.device, "gate")
        sizes = {"KIND": KINDS.index(kind), "BLOCK": config.block}
        grid = (y.numel() // width, triton.cdiv(width, config.block))
        launch(_gate, grid, x, y, width, float(limit), **sizes, **runs(config))
    return y


def _trial_activate(probe: Probe) -> Iterator[Call]:
    for kind in SIMPLE:
        yield Call((4 * probe.random(3, probe.feed_forward), kind), {})


def _trial_gate(probe: Probe) -> Iterator[Call]:
    for kind in KINDS:
        yield Call((4 * probe.random(3, 2 * probe.feed_forward), kind), {"limit": 7.0})


ACTIVATE = Kernel("activate", activate_reference, _launch_activate, _trial_activate)
GATE = Kernel("gate", gate_reference, _launch_gate, _trial_gate)


def activate(x: Tensor, kind: str) -> Tensor:
    """x of any shape -> the same shape"""
    if kind not in SIMPLE:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(SIMPLE)}")
    found: Tensor = ACTIVATE(x, kind)
    return found


def gate(x: Tensor, kind: str, limit: float = 0.0) -> Tensor:
    """x [..., 2 · ff], the gate's half first -> [..., ff]"""
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(KINDS)}")
    if x.shape[-1] % 2:
        raise ValueError(f"gate | up must be two halves, and the width is {x.shape[-1]}")
    found: Tensor = GATE(x, kind, limit)
    return found
