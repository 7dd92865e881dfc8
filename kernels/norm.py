"""RMS and layer norm over the last axis, with the residual add fused; sums in float32.

rms:    y = x · rsqrt(mean(x²) + eps) · (weight + offset)
layer:  y = (x − mean(x)) · rsqrt(var(x) + eps) · weight + bias
add_*:  s = x + residual (rounded to x's type), and the norm of s; both are returned.

In Triton a program has some whole rows in registers, so that each is read once. How a row is
summed depends on its width alone, never on how many there are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Call, Kernel, Probe, launch, tl, triton
from kernels.config import Config, Key, configured, runs

WIDEST = 1 << 16  # a row has to fit into a program's registers


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = _widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.to(wide.dtype) + offset)).to(x.dtype)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    wide = _widen(x)
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps, offset), total


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@triton.jit
def _norm(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    rows,
    width,
    eps,
    offset,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    at = row * width + column
    s = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + at, inside, other=0.0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + at, rounded, inside)
        s = rounded.to(tl.float32)
    if not RMS:
        s = tl.where(inside, s - tl.sum(s, 1, keep_dims=True) / width, 0.0)
    found = s * tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / width + eps)
    if weight is not None:
        found *= tl.load(weight + column, column < width, other=0.0).to(tl.float32) + offset
    if bias is not None:
        found += tl.load(bias + column, column < width, other=0.0).to(tl.float32)
    tl.store(y + at, found.to(y.dtype.element_ty), inside)


# By the width of a row, rounded up: numbers a program takes, if they are more than a row's. Half a
# thousand numbers a warp are two loads of 16 bytes a lane; narrow rows (one head) share a program.
CONFIGS: dict[Key, Config] = {
    (1024,): Config(1024, 2),
    (2048,): Config(2048, 4),
    (4096,): Config(4096, 8),
    (8192,): Config(8192, 16),
}


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    columns = triton.next_power_of_2(width)
    config = configured(CONFIGS, x.device, min(max(columns, 1024), 8192))
    rows = max(1, config.block // columns)
    if count := x.numel() // width:
        launch(
            _norm,
            (-(-count // rows),),
            x,
            None if residual is None else residual.contiguous(),
            weight,
            bias,
            y,
            total,
            count,
            width,
            eps,
            offset,
            RMS=rms,
            ROWS=rows,
            WIDTH=columns,
            **runs(config),
        )
    return y, total


def _rms(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return _launch(x, None, weight, None, eps, offset, True)[0]


def _layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, weight, bias, eps, 0.0, False)[0]


def _add_rms(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, None, eps, offset, True)


def _add_layer(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, bias, eps, 0.0, False)


def _trial_inputs(probe: Probe) -> Iterator[list[Tensor]]:
    """x, residual, weight, bias: of the stream's width, and of a head's."""
    for width in (probe.hidden, probe.head_dim):
        weight, bias = (probe.random(width, seed=seed).float() for seed in (2, 3))
        yield [probe.random(3, width), probe.random(3, width, seed=1), weight, bias]


def _trial_rms(probe: Probe) -> Iterator[Call]:
    for x, _, weight, _ in _trial_inputs(probe):
        yield Call((x, weight, 1e-5), {"offset": 1.0})


def _trial_layer(probe: Probe) -> Iterator[Call]:
    for x, _, weight, bias in _trial_inputs(probe):
        yield Call((x, weight, bias, 1e-5), {})


def _trial_add_rms(probe: Probe) -> Iterator[Call]:
    x, residual, weight, _ = next(_trial_inputs(probe))
    yield Call((x, residual, weight, 1e-5), {})


def _trial_add_layer(probe: Probe) -> Iterator[Call]:
    yield Call((*next(_trial_inputs(probe)), 1e-5), {})


RMS_NORM = Kernel("rms_norm", rms_norm_reference, _rms, _trial_rms)
LAYER_NORM = Kernel("layer_norm", layer_norm_reference, _layer, _trial_layer)
ADD_RMS_NORM = Kernel("add_rms_norm", add_rms_norm_reference, _add_rms, _trial_add_rms)
ADD_LAYER_NORM = Kernel("add_layer_norm", add_layer_norm_reference, _add_layer, _trial_add_layer)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., width], weight [width] -> [..., width]"""
    _check(x, None, weight)
    found: Tensor = RMS_NORM(x, weight, eps, offset)
    return found


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., width], weight and bias [width] -> [..., width]"""
    _check(x, None, weight, bias)
    found: Tensor = LAYER_NORM(x, weight, bias, eps)
    return found


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-> (norm of the sum, the sum), both [..., width]"""
    _check(x, residual, weight)
    normed, total = ADD_RMS_NORM(x, residual, weight, eps, offset)
    return normed, total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (norm of the sum, the sum), both [..., width]"""
    _check(x, residual, weight, bias)
    normed, total = ADD_LAYER_NORM(x, residual, weight, bias, eps)
    return normed, total


def _check(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> None:
    width = x.shape[-1]
    if width > WIDEST:
        raise ValueError(f"rows of {width} numbers: norms are made for at most {WIDEST}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.dtype}, x {list(x.shape)} {x.dtype}"
        )
    for vector in vectors:
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"weight or bias is {list(vector.shape)}, expected [{width}]")
