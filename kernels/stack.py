"""A plain decoder's layers, and the norm after them, in one call to C++.

It calls there what Python calls one by one. What a layer costs beyond its arithmetic, some twenty
Python calls, is as long as reading a million weights: a quarter of a step of half a billion.
Structures here are those of `cpp/stack.h`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import build, native
from kernels.native import Packed

P, I64, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ACTIVATIONS = ("silu", "gelu_tanh")


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("values", "scales", "sums", "bias")),
        *((name, I64) for name in ("inner", "out", "groups", "kind")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("qkv", "out", "up", "down")),
        *((name, P) for name in ("norm", "norm_bias", "mlp_norm", "mlp_norm_bias")),
        *((name, P) for name in ("out_norm", "mlp_out_norm")),
        *((name, P) for name in ("query_norm", "key_norm", "sinks", "angles", "keys", "values")),
        *((name, I64) for name in ("pairs", "interleaved", "window")),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("layers", "slopes", "norm", "norm_bias")),
        *((name, I64) for name in ("count", "hidden", "heads", "kv_heads", "dim", "page")),
        *((name, I64) for name in ("by_position", "by_channel", "bytes")),
        *((name, I64) for name in ("rms", "gated", "gelu", "grain", "reading")),
        *((name, F32) for name in ("eps", "scale", "softcap")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("slots", "at", "starts", "lengths", "table", "wanted")),
        *((name, I64) for name in ("tokens", "rows", "width", "longest", "wants")),
    )


@dataclass(frozen=True)
class LayerParts:
    """One layer's weights, and its pages [pages, kv_heads, page, dim]."""

    products: dict[str, tuple[Packed, Tensor | None]]  # qkv, out, up, down: weight and bias
    tensors: dict[str, Tensor | None]  # norms, sinks, angles [positions, 2 · pairs]
    keys: Tensor
    values: Tensor
    interleaved: bool
    window: int


@dataclass(frozen=True)
class Shape:
    """What all layers share."""

    heads: int
    rms: bool
    gated: bool
    activation: str
    eps: float
    scale: float
    softcap: float
    slopes: Tensor | None
    norm: Tensor
    norm_bias: Tensor | None


class Stack:
    """The layers, held with everything that C++ reads by address."""

    def __init__(self, shape: Shape, layers: Sequence[LayerParts]) -> None:
        self.held = shape, layers
        self.layers = (_Layer * len(layers))(*map(_layer, layers))
        _, kv_heads, page, dim = layers[0].keys.shape
        self.stack = _Stack(
            layers=ctypes.addressof(self.layers),
            slopes=_address(shape.slopes),
            norm=_address(shape.norm),
            norm_bias=_address(shape.norm_bias),
            count=len(layers),
            hidden=layers[0].products["out"][0].out,
            kv_heads=kv_heads,
            dim=dim,
            page=page,
            by_position=layers[0].keys.stride(2),
            by_channel=layers[0].keys.stride(3),
            bytes=layers[0].keys.itemsize,
            gelu=ACTIVATIONS.index(shape.activation),
            grain=native.GRAIN,
            reading=native.READING,
            **{name: getattr(shape, name) for name in ("heads", "rms", "gated")},
            **{name: getattr(shape, name) for name in ("eps", "scale", "softcap")},
        )

    def __call__(
        self,
        x: Tensor,
        slots: Tensor,
        at: Tensor,
        starts: Tensor,
        lengths: Tensor,
        page_table: Tensor,
        longest: int,
        wanted: Tensor | None,
    ) -> Tensor:
        """x [tokens, hidden], which is written over -> what the head reads; anything for tokens
        that are not `wanted`"""
        found, table = torch.empty_like(x), page_table.int().contiguous()
        where = slots.long(), at.long(), starts.int(), lengths.int(), table, wanted
        wants = len(x) if wanted is None else len(wanted)
        sizes = len(x), len(lengths), table.shape[1], longest, wants
        step = _Step(*map(_address, where), *sizes)
        build.compiled().stack_f32(
            ctypes.byref(self.stack), ctypes.byref(step), x.data_ptr(), found.data_ptr()
        )
        return found


def _layer(parts: LayerParts) -> _Layer:
    angles = parts.tensors["angles"]
    return _Layer(
        keys=parts.keys.data_ptr(),
        values=parts.values.data_ptr(),
        pairs=0 if angles is None else angles.shape[1] // 2,
        interleaved=parts.interleaved,
        window=parts.window,
        **{name: _product(*product) for name, product in parts.products.items()},
        **{name: _address(tensor) for name, tensor in parts.tensors.items()},
    )


def _product(weight: Packed, bias: Tensor | None) -> _Product:
    where = map(_address, (weight.values, weight.scales, weight.sums, bias))
    return _Product(*where, weight.inner, weight.out, weight.groups, weight.kind)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
