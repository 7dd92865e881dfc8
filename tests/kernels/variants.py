"""Which variants of each kernel are compiled ahead of time, and what they may do.

A variant is what a kernel's trial launches for a `Probe`; a kernel without an entry is compiled
for `USUAL`. The first probe of a kernel is in `make test`, the others in `make test-slow`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.backend import Probe

CPU = torch.device("cpu")
BF16 = Probe(
    CPU, torch.bfloat16, heads=32, kv_heads=8, head_dim=128, hidden=4096, vocabulary=128_256
)
USUAL = (BF16, Probe(CPU, torch.float32))


@dataclass(frozen=True)
class Variants:
    probes: tuple[Probe, ...] = USUAL
    copies: tuple[str, ...] = ()  # who lives from asynchronous copies, and must have some
    narrow: bool = False  # it has a reason to load single numbers of one or two bytes
    archs: tuple[int, ...] = (80, 90, 120)


def _bf16(heads: int, kv_heads: int, head_dim: int, **features: Any) -> Probe:
    return Probe(CPU, torch.bfloat16, heads, kv_heads, head_dim, **features)


ATTENTION = (
    BF16,  # Llama 3 8B
    replace(BF16, page_dtype=torch.int8),
    replace(BF16, page_dtype=torch.float8_e4m3fn),
    replace(BF16, page=64),
    replace(BF16, page=128),
    replace(BF16, dtype=torch.float16),
    replace(BF16, dtype=torch.float32),
    _bf16(32, 8, 64),  # Llama 3.2 1B
    _bf16(32, 8, 64, page_dtype=torch.int8),
    _bf16(32, 8, 64, page_dtype=torch.float8_e4m3fn),
    _bf16(12, 12, 64),  # GPT-2
    Probe(CPU, torch.float32, 12, 12, 64),
    _bf16(32, 32, 80),  # Phi-2
    _bf16(32, 32, 96),  # Phi-3 mini
    _bf16(28, 4, 128),  # Qwen 2.5 7B
    _bf16(64, 8, 64, sinks=True, window=128),  # gpt-oss
    _bf16(64, 8, 64, sinks=True),
    _bf16(32, 16, 128, softcap=50.0, window=4096),  # Gemma 2 27B
    _bf16(16, 8, 256, softcap=50.0),  # Gemma 2 9B
    _bf16(8, 4, 256, window=1024),  # Gemma 3 4B
    _bf16(16, 16, 256),  # GPT-J
    _bf16(8, 4, 256, page_dtype=torch.int8),
    _bf16(8, 4, 256, page_dtype=torch.float8_e4m3fn),
    Probe(CPU, torch.float32, 8, 4, 256),
    _bf16(32, 32, 128, slopes=True),  # BLOOM 7B
    _bf16(71, 1, 64),  # Falcon 7B
)

PAGES = (
    BF16,
    replace(BF16, normed=True),  # Qwen 3
    replace(BF16, page_dtype=torch.int8),
    replace(BF16, page_dtype=torch.float8_e4m3fn, normed=True),
    _bf16(12, 12, 64, turned=0),  # GPT-2
    _bf16(32, 32, 80, turned=32),  # Phi-2
    _bf16(16, 16, 256, turned=64, interleaved=True),  # GPT-J
    Probe(CPU, torch.float32),
)

VARIANTS: dict[str, Variants] = {
    "attention": Variants(ATTENTION, copies=("_short", "_long", "_shared")),
    "store": Variants(PAGES),
    "copy_pages": Variants((BF16, replace(BF16, page_dtype=torch.int8), _bf16(32, 32, 80))),
    "linear": Variants(copies=("_linear",)),
    "sample": Variants(copies=("_sample",)),
}


def variants(kernel: str) -> Variants:
    return VARIANTS.get(kernel, Variants())
