"""RMS and layer norm over the last axis, with the residual add fused; sums in float32.

rms:    y = x · rsqrt(mean(x²) + eps) · (weight + offset)
layer:  y = (x − mean(x)) · rsqrt(var(x) + eps) · weight + bias
add_*:  s = x + residual (rounded to x's type), and the norm of s; both are returned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + offset)).to(x.dtype)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., width], weight [width] -> [..., width]"""
    return rms_norm_reference(x, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., width], weight and bias [width] -> [..., width]"""
    return layer_norm_reference(x, weight, bias, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-> (norm of the sum, the sum), both [..., width]"""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (norm of the sum, the sum), both [..., width]"""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total
