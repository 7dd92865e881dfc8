"""Weights as a CPU likes to read them: applied to a loaded decoder from outside.

Products then run natively, with float32 activations over float32, bfloat16 or int8 weights, and
a row's result is bit for bit the same in any company. See `kernels/native.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.linear import Int8Weight, Weight, quantize_int8
from kernels.native import Packed, pack, unpack
from model.decoder import Decoder, Linear


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
            return unpack(self.weight, tokens)
        return self.weight[tokens].float()


def pack_decoder(decoder: Decoder, int8_head: bool = False) -> None:
    """Raises native.NotHere. An int8 weight with groups in a row keeps torch's way."""
    native.enable()
    for name, module in list(decoder.named_modules()):
        if isinstance(module, Linear) and module is not decoder.head:
            packed = _packed(module.weight)
            if packed is not None:
                decoder.set_submodule(name, PackedLinear(packed, module.bias))
    table = decoder.embed.get_parameter("weight").detach()
    weight = table if decoder.head is None else decoder.head.get_parameter("weight").detach()
    head = _packed(quantize_int8(weight) if int8_head and native.has_int8() else weight)
    assert head is not None
    decoder.embed = Lookup(head if decoder.head is None else table)
    bias = None if decoder.head is None else getattr(decoder.head, "bias", None)
    decoder.head = PackedLinear(head, bias)
    for parameter in decoder.parameters():  # what is left: norms, experts, learned positions
        parameter.data = parameter.data.float()


def _packed(weight: Weight) -> Packed | None:
    """None: only torch knows how to multiply by it."""
    if isinstance(weight, Int8Weight) and weight.scales.shape[1] == 1 and native.has_int8():
        return pack(weight.values, weight.scales[:, 0])
    if not isinstance(weight, Tensor):
        return None
    weight = weight.detach()
    return pack(weight if weight.dtype == torch.bfloat16 else weight.float())
