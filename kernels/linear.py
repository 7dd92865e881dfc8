"""y = x Wᵀ + b, for the formats a weight comes in.

A quantised weight is W[o, i] = values[o, i] · scales[o, i // (in / groups)].

On a CPU an int8 weight meets activations rounded to int8 too, each row by its own largest value:
the product is then exact in integers, which is fast and makes a row's result independent of the
rest of the batch. Everywhere else, and wherever a gradient is asked for, activations stay as
they are.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Int8Weight(NamedTuple):
    values: Tensor  # [out, in] int8
    scales: Tensor  # [out, groups] float32


Weight = Tensor | Int8Weight


def quantize_int8(weight: Tensor, groups: int = 1) -> Int8Weight:
    """Symmetric, by the largest of each of `groups` equal runs of a row."""
    out, inner = weight.shape
    if inner % groups:
        raise ValueError(f"a row of {inner} weights cannot be cut into {groups} equal groups")
    runs = weight.float().view(out, groups, -1)
    scales = (runs.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    values = (runs / scales[..., None]).round().to(torch.int8)
    return Int8Weight(values.view(out, inner), scales)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """-> [out, in]"""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    groups = weight.scales.shape[1]
    runs = weight.values.float().view(len(weight.values), groups, -1)
    return (runs * weight.scales[..., None]).flatten(1).to(dtype)


def linear_reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize(weight, x.dtype), bias)


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The CPU's own way: rows of x rounded to int8, integer products, scaled group by group."""
    rows = x.reshape(-1, x.shape[-1]).float()
    row_scales = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    rounded = (rows / row_scales).round().to(torch.int8)
    width = rows.shape[1] // weight.scales.shape[1]
    y = torch.zeros(len(rows), len(weight.values))
    for scales, values, part in zip(
        weight.scales.T,
        torch.split(weight.values, width, 1),
        torch.split(rounded, width, 1),
        strict=True,
    ):
        y += torch._int_mm(part.contiguous(), values.T) * scales
    y = y * row_scales
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out]"""
    values = weight if isinstance(weight, Tensor) else weight.values
    if x.shape[-1] != values.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} channels and the weight takes {values.shape[1]}")
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled()):
        return linear_int8(x, weight, bias)
    return linear_reference(x, weight, bias)
