"""Pointwise activations, alone or multiplied with the other half of a gated MLP.

activate:  y = f(x)
gate:      y = f(gate) · up, of x = gate | up
swigluoai (gpt-oss): g = min(gate, limit), u = clamp(up, ±limit), y = (u + 1) · g · sigmoid(1.702 g)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
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


def activate(x: Tensor, kind: str) -> Tensor:
    """x of any shape -> the same shape"""
    if kind not in SIMPLE:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(SIMPLE)}")
    return activate_reference(x, kind)


def gate(x: Tensor, kind: str, limit: float = 0.0) -> Tensor:
    """x [..., 2 · ff], the gate's half first -> [..., ff]"""
    if kind not in SIMPLE and kind != "swigluoai":
        raise ValueError(f"activation {kind!r} is not one of {', '.join(SIMPLE)}, swigluoai")
    if x.shape[-1] % 2:
        raise ValueError(f"gate | up must be two halves, and the width is {x.shape[-1]}")
    return gate_reference(x, kind, limit)
