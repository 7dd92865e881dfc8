"""y = x Wᵀ + b, for the formats a weight comes in.

A quantised weight is W[o, i] = values[o, i] · scales[o, i // group], group = in / groups. Two
4-bit values share a byte: of each group, byte j holds value j in its low half and value
j + group / 2 in its high half, both plus 8, so that unpacking never moves a number sideways.

On a CPU an int8 weight meets activations rounded to int8 too, each row by its own largest value:
the product is then exact in integers, which is fast and makes a row's result independent of the
rest of the batch. Everywhere else, and wherever a gradient is asked for, activations stay as
they are.

In Triton a few rows (decode) read the weight once, at the speed of memory. A weight with few
outputs is cut along its rows into parts, so that there are blocks for all processors, and the
last block to finish sums the parts in their order: the order of the sum depends on the weight's
shape alone. Many rows are the business of torch's matrix product, for which a quantised weight is
first made whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Call, Kernel, Probe, counters, describe, launch, tl, triton
from kernels.config import Key, configured, runs


class Int8Weight(NamedTuple):
    values: Tensor  # [out, in] int8
    scales: Tensor  # [out, groups] float32


class Int4Weight(NamedTuple):
    values: Tensor  # [out, in / 2] uint8, as told above
    scales: Tensor  # [out, groups] float32


class Fp8Weight(NamedTuple):
    values: Tensor  # [out, in] float8_e4m3fn
    scales: Tensor  # [out, groups] float32


Quantised = Int8Weight | Int4Weight | Fp8Weight
Weight = Tensor | Quantised


# -- formats --------------------------------------------------------------------------------------


def quantize_int8(weight: Tensor, groups: int = 1) -> Int8Weight:
    """Symmetric, by the largest of each of `groups` equal runs of a row."""
    runs, scales = _runs(weight, groups, 127)
    values = (runs / scales[..., None]).round().to(torch.int8)
    return Int8Weight(values.view(weight.shape), scales)


def quantize_int4(weight: Tensor, groups: int) -> Int4Weight:
    """The same to −7 … 7."""
    runs, scales = _runs(weight, groups, 7)
    if runs.shape[-1] % 2:
        raise ValueError(f"groups of {runs.shape[-1]} weights cannot be halved into bytes")
    low, high = ((runs / scales[..., None]).round() + 8).to(torch.uint8).chunk(2, -1)
    return Int4Weight((low | high << 4).view(len(weight), -1), scales)


def quantize_fp8(weight: Tensor, groups: int = 1) -> Fp8Weight:
    runs, scales = _runs(weight, groups, 448)
    values = (runs / scales[..., None]).to(torch.float8_e4m3fn)
    return Fp8Weight(values.view(weight.shape), scales)


def _runs(weight: Tensor, groups: int, largest: float) -> tuple[Tensor, Tensor]:
    """-> [out, groups, group] float32, and the scales that bring each run's largest to `largest`"""
    out, inner = weight.shape
    if inner % groups:
        raise ValueError(f"a row of {inner} weights cannot be cut into {groups} equal groups")
    runs = weight.float().view(out, groups, -1)
    return runs, (runs.abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """-> [out, in]"""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    runs = weight.values.view(*weight.scales.shape, -1)
    if isinstance(weight, Int4Weight):
        runs = torch.cat([runs & 15, runs >> 4], -1).to(torch.int8) - 8
    return (runs.float() * weight.scales[..., None]).flatten(1).to(dtype)


def width(weight: Weight) -> int:
    """How many channels it takes."""
    if isinstance(weight, Tensor):
        return weight.shape[1]
    return weight.values.shape[1] * (2 if isinstance(weight, Int4Weight) else 1)


# -- ways -----------------------------------------------------------------------------------------


def linear_reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize(weight, x.dtype), bias)


def linear_native(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Int8Weight):
        return linear_int8(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Rows of x rounded to int8, integer products, scaled group by group."""
    rows = x.reshape(-1, x.shape[-1]).float()
    row_scales = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    rounded = (rows / row_scales).round().to(torch.int8)
    group = rows.shape[1] // weight.scales.shape[1]
    y = torch.zeros(len(rows), len(weight.values))
    for scales, values, part in zip(
        weight.scales.T,
        torch.split(weight.values, group, 1),
        torch.split(rounded, group, 1),
        strict=True,
    ):
        y += torch._int_mm(part.contiguous(), values.T) * scales
    y = y * row_scales
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


@triton.jit
def widen(values, dtype: tl.constexpr):
    """Numbers as operands of a product; bytes are fp8 e4m3, which not every GPU can convert."""
    if values.dtype == tl.uint8:  # the bits of a float16 2⁸ times smaller, subnormals included
        bits = values.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        wide = (half * 256.0).to(dtype)
    else:
        wide = values.to(dtype)
    return wide


_FREE = ["parts", "steps"]  # they compile nothing anew


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_FREE)
def _linear(
    x, values, scales, bias, y, partial, arrivals, rows, out, inner, groups, parts, steps,
    GROUP: tl.constexpr, INT4: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of outputs, parts); a part is `steps` times BLOCK_K values, or int4's bytes.

    GROUP: values a scale, 0: all of a row. MASKED: BLOCK_K does not divide a row."""
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mine = (m < rows)[:, None]  # rows past the end are not read: at one row they would be most
    theirs = tl.where(n < out, n, 0).to(tl.int64)  # columns past it are few, and read another
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    WIDTH: tl.constexpr = 2 * BLOCK_K if INT4 else BLOCK_K  # values a step
    begin, end = 0, tl.cdiv(inner, WIDTH)
    if CUT:
        begin = tl.program_id(1) * steps
        end = tl.minimum(begin + steps, end)
    if GROUP > 0:  # each scale is asked for a step ahead
        scale = tl.load(scales + theirs * groups + begin * WIDTH // GROUP)
    for i in range(begin, end):
        if INT4:
            STEPS: tl.constexpr = GROUP // WIDTH
            at = tl.multiple_of(i // STEPS * GROUP + i % STEPS * BLOCK_K, BLOCK_K)
            left = x + m[:, None].to(tl.int64) * inner + at + k[None, :]
            byte = tl.load(values + theirs[None, :] * (inner // 2) + i * BLOCK_K + k[:, None])
            low = ((byte & 15).to(tl.int8) - 8).to(x.dtype.element_ty)
            high = ((byte >> 4).to(tl.int8) - 8).to(x.dtype.element_ty)
            part = tl.dot(tl.load(left, mine, other=0.0), low, input_precision="ieee")
            right = tl.load(left + GROUP // 2, mine, other=0.0)
            part = tl.dot(right, high, part, input_precision="ieee")
        else:
            at = i * BLOCK_K
            left = x + m[:, None].to(tl.int64) * inner + at + k[None, :]
            right = values + theirs[None, :] * inner + at + k[:, None]
            if MASKED:
                a = tl.load(left, mine & (at + k[None, :] < inner), other=0.0)
                b = widen(tl.load(right, at + k[:, None] < inner, other=0), x.dtype.element_ty)
            else:
                a = tl.load(left, mine, other=0.0)
                b = widen(tl.load(right), x.dtype.element_ty)
            if GROUP == 0:
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:
                part = tl.dot(a, b, input_precision="ieee")
        if GROUP > 0:
            acc += part * scale[None, :]
            scale = tl.load(scales + theirs * groups + (i + 1) * WIDTH // GROUP % groups)
    at = m[:, None].to(tl.int64) * out + n[None, :]
    known = mine & (n < out)[None, :]
    if CUT:
        each = rows * out
        tl.store(partial + tl.program_id(1) * each + at, acc, known)
        tl.debug_barrier()  # all threads' numbers are written before the one that counts says so
        here = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
        if here < parts - 1:
            return
        tl.store(arrivals + tl.program_id(0), 0)  # ready for the next launch
        tl.debug_barrier()
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(parts):
            acc += tl.load(partial + i * each + at, known, other=0.0, cache_modifier=".cg")
    if scales is not None and GROUP == 0:
        acc *= tl.load(scales + theirs)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, n < out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), known)


class Config(NamedTuple):
    columns: int  # outputs of a block
    run: int  # bytes of a weight's row at once
    rows: int  # of x that Triton takes; above, tensor cores are filled anyway
    warps: int
    stages: int  # steps in flight, if two blocks of so many fit into a processor


# By the bytes of a weight's value, 0 for half of one. Quantised ones take more rows: making a
# weight whole costs as much as some 64 of them. Float32 has no tensor cores, and more than 64
# numbers at once do not fit into registers. Chosen for no spills, not yet by time.
CONFIGS: dict[Key, Config] = {
    (4,): Config(32, 256, 16, 4, 5),
    (2,): Config(32, 256, 16, 4, 5),
    (1,): Config(32, 256, 64, 4, 5),
    (0,): Config(32, 256, 64, 4, 5),
}
BLOCKS = 264  # two for each processor of an H200: weights with fewer are cut into parts, …
LEAST_STEPS = 4  # … which are no shorter, or they end before their loads are under way
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may ask for, by arch


def _launch(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    int4, inner, out = isinstance(weight, Int4Weight), rows.shape[1], len(values)
    config = configured(CONFIGS, x.device, 0 if int4 else values.element_size())
    group = 0 if scales is None or scales.shape[1] == 1 else inner // scales.shape[1]
    if int4 and not group:
        group = inner
    block = _block_k(group // 2 if int4 else group, x, config.run // values.element_size())
    if len(rows) > config.rows or block < 16:
        return linear_reference(x, weight, bias)
    y = rows.new_empty(len(rows), out)
    if not len(rows):
        return y.view(*x.shape[:-1], out)
    columns = triton.cdiv(out, config.columns)
    parts, steps = _parts(columns, triton.cdiv(inner, 2 * block if int4 else block))
    partial = rows.new_empty((parts, len(rows), out) if parts > 1 else 0, dtype=torch.float32)
    tile = (max(16, triton.next_power_of_2(len(rows))), config.columns, block)
    config = config._replace(stages=_stages(x, values, tile, config.stages))
    launch(
        _linear, (columns, parts), rows,
        values.view(torch.uint8) if isinstance(weight, Fp8Weight) else values.contiguous(),
        scales, bias, y, partial, counters(x.device, columns), len(rows), out, inner,
        1 if scales is None else scales.shape[1], parts, steps,
        GROUP=group, INT4=int4, MASKED=not group and inner % block != 0, CUT=parts > 1,
        **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile)),
        **runs(config),
    )  # fmt: skip
    return y.view(*x.shape[:-1], out)


def _parts(columns: int, steps: int) -> tuple[int, int]:
    """-> of how many parts a row is, and of how many steps each"""
    parts = max(1, min(BLOCKS // columns, steps // LEAST_STEPS))
    each = -(-steps // parts)
    return -(-steps // each), each


def _block_k(run: int, x: Tensor, most: int) -> int:
    """At most so many values at once, a power of two that divides a run (0: no run)."""
    most = min(64, most) if x.element_size() == 4 else most
    return min(most, run & -run) if run else most


def _stages(x: Tensor, values: Tensor, tile: tuple[int, int, int], most: int) -> int:
    """As many tiles on their way as let two blocks share a processor."""
    m, n, k = tile
    bytes_ = k * (m * x.element_size() + n * values.element_size())
    room = SHARED.get(describe(x.device).arch, SHARED[90]) // 2
    return max(2, min(most, room // bytes_))


def _trial(probe: Probe) -> Iterator[Call]:
    """Each format; a single row; and a weight that is not cut."""
    x, whole = probe.random(3, probe.hidden), probe.random(96, probe.hidden, seed=1)
    bias = probe.random(96, seed=2)
    groups = 1 if probe.hidden % 64 else probe.hidden // 64
    yield Call((x, whole, bias), {})
    yield Call((x, quantize_int8(whole), bias), {})
    yield Call((x, quantize_int8(whole, groups), None), {})
    yield Call((x, quantize_fp8(whole), None), {})
    if probe.hidden % 2 == 0:
        yield Call((x, quantize_int4(whole, groups), None), {})
    yield Call((x[:1], whole, None), {})
    yield Call((x[:1], quantize_int8(whole), None), {})
    yield Call((x[:, :256].contiguous(), whole[:, :256].contiguous(), None), {})


LINEAR = Kernel("linear", linear_reference, _launch, _trial, native=linear_native)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out]"""
    if x.shape[-1] != width(weight):
        raise ValueError(f"x has {x.shape[-1]} channels and the weight takes {width(weight)}")
    found: Tensor = LINEAR(x, weight, bias)
    return found
