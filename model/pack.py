"""Weights as a CPU likes to read them: applied to a loaded decoder from outside.

Products then run natively, with float32 activations over floats in 32 or 16 bits, rounded ones
over int8 and int4, and a row's result is bit for bit the same in any company. See
`kernels/native.py`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.linear import Int4Weight, Int8Weight
from kernels.native import Packed, pack, unpack
from kernels.stack import ACTIVATIONS, LayerParts, Shape, Stack
from model.cache import Cache, Rows
from model.decoder import MLP, Decoder, Layer, Linear, Norm


class PackedLinear(nn.Module):
    """In the place of a `Linear`."""

    def __init__(self, weight: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, unpack(self.weight), self.bias)
        return native.linear(x, self.weight, self.bias)


class Lookup(nn.Module):
    """In the place of an embedding: gives float32, whatever its rows are kept in."""

    def __init__(self, weight: Packed | Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, Packed):
            return native.lookup(self.weight, tokens)
        return self.weight[tokens].float()


def pack_decoder(decoder: Decoder) -> None:
    """Raises build.NotHere. An int8 weight with groups in a row keeps torch's way."""
    native.enable()
    products = {n for n, m in decoder.named_modules() if isinstance(m, Linear) and n != "head"}
    for name in products:  # each is let go before the next
        product = decoder.get_submodule(name)
        assert isinstance(product, Linear)
        packed = _packed(product.weight)
        if packed is not None:
            decoder.set_submodule(name, PackedLinear(packed, product.bias))
    head = _packed(decoder.embed.weight if decoder.head is None else decoder.head.weight)
    assert head is not None
    table = None if decoder.head is None else decoder.embed.get_parameter("weight").detach()
    decoder.embed = Lookup(head if table is None else table)
    bias = None if decoder.head is None else getattr(decoder.head, "bias", None)
    decoder.head = PackedLinear(head, bias)
    for parameter in decoder.parameters():  # what is left: norms, experts, learned positions
        parameter.data = parameter.data.float()
    if plain(decoder):
        decoder.whole = Layers(decoder)


def plain(decoder: Decoder) -> bool:
    """Whether the layers run in one call: those of GPT-2, Llama, Gemma and most others do."""
    config = decoder.config
    usual = config.norms == "pre" or (config.norms, config.norm) == ("both", "rms")
    usual = usual and not config.parallel and config.residual_scale == 1
    normed = config.qk_norm == "none" or (config.qk_norm, config.qk_norm_kind) == ("head", "rms")
    small = config.head_dim <= 256 and config.heads // config.kv_heads <= 128
    packed = all(
        isinstance(module, PackedLinear)
        for layer in decoder.layers
        for name, module in layer.named_modules()
        if name.endswith((".qkv", ".out", ".up", ".down"))
    )
    known = config.activation in ACTIVATIONS and not config.experts
    usual = usual and decoder.norm is not None and not config.shared_norm
    return usual and normed and small and packed and known


class Layers:
    """All layers, and the norm after them, in one call, of the cache of the last call."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.cache: Cache | None = None

    def __call__(self, x: Tensor, rows: Rows, cache: Cache) -> Tensor:
        if self.cache is not cache:
            if not native.reads_pages(cache.layer(0)[0]):  # C++ would read them all the same
                raise ValueError(
                    f"pages are {cache.pages.dtype} of {cache.page_size} tokens: packed layers "
                    "read float32, or bfloat16 in pages and heads of multiples of 16"
                )
            self.cache, self.stack = cache, Stack(self._shape(), list(self._parts(cache)))
        where = rows.slots, rows.positions, rows.starts, rows.lengths, rows.page_table
        return self.stack(x, *where, rows.longest_context, rows.wanted)

    def _shape(self) -> Shape:
        config, norm = self.decoder.config, self.decoder.norm
        assert norm is not None
        return Shape(
            heads=config.heads,
            rms=config.norm == "rms",
            gated=config.gated,
            activation=config.activation,
            eps=config.norm_eps,
            scale=config.scale,
            softcap=config.attention_softcap,
            slopes=self.decoder.place.slopes,
            norm=norm.weight,
            norm_bias=norm.bias,
        )

    def _parts(self, cache: Cache) -> Iterator[LayerParts]:
        config, place = self.decoder.config, self.decoder.place
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, Layer)
            attention, mlp = layer.attention, layer.mlp
            assert isinstance(mlp, MLP)
            modules = {"qkv": attention.qkv, "out": attention.out, "up": mlp.up, "down": mlp.down}
            norms = {"norm": layer.attention_norm, "mlp_norm": layer.mlp_norm}
            rope, (keys, values) = attention.rope, cache.layer(index)
            yield LayerParts(
                products={name: _product(module) for name, module in modules.items()},
                tensors={
                    **{name: _weight(norm) for name, norm in norms.items()},
                    **{f"{name}_bias": _bias(norm) for name, norm in norms.items()},
                    "out_norm": _weight(layer.attention_out_norm),
                    "mlp_out_norm": _weight(layer.mlp_out_norm),
                    "query_norm": _weight(attention.q_norm),
                    "key_norm": _weight(attention.k_norm),
                    "sinks": attention.sinks,
                    "angles": None if rope is None else place.table(rope),
                },
                keys=keys,
                values=values,
                interleaved=rope is not None and rope.interleaved,
                window=config.window(index),
            )


def _weight(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _bias(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.bias


def _product(module: nn.Module) -> tuple[Packed, Tensor | None]:
    assert isinstance(module, PackedLinear)
    return module.weight, module.bias


def _packed(weight: object) -> Packed | None:
    """None: only torch knows how to multiply by it."""
    if isinstance(weight, Int8Weight) and weight.scales.shape[1] == 1 and native.has_int8():
        return pack(weight.values, weight.scales[:, 0], own=True)
    if isinstance(weight, Int4Weight) and native.packs_int4(*weight):
        return pack(*weight, own=True)
    if not isinstance(weight, Tensor):
        return None
    weight = weight.detach()
    return pack(weight, own=True)
