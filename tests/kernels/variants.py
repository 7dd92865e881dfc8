"""Which variants of each kernel are compiled ahead of time, and what they may do.

A variant is what a kernel's trial launches for a `Probe`; a kernel without an entry is compiled
for `USUAL`. The first probe of a kernel is in `make test`, the others in `make test-slow`.
"""

from dataclasses import dataclass, field

import torch

from kernels.backend import Probe

CPU = torch.device("cpu")
BF16 = Probe(CPU, torch.bfloat16, heads=32, kv_heads=8, head_dim=128, hidden=4096)
USUAL = (BF16, Probe(CPU, torch.float32))


@dataclass(frozen=True)
class Variants:
    probes: tuple[Probe, ...] = USUAL
    copies: bool = False  # it lives from asynchronous copies, and must have some
    narrow: bool = False  # it has a reason to load single numbers of one or two bytes
    archs: tuple[int, ...] = field(default=(80, 90, 120))


VARIANTS: dict[str, Variants] = {}


def variants(kernel: str) -> Variants:
    return VARIANTS.get(kernel, Variants())
