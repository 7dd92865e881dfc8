"""The kernels that are tried at start are those that run, variant by variant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.backend import KERNELS, Launch, pretend
from model.cache import Cache
from model.decoder import Decoder
from model.trust import probes
from model.weights import load
from tests.kernels.aot import DEVICES
from tests.model.families import make
from tests.model.test_families import rows_in_pages, scattered_pages

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed here")
Variant = tuple[str, tuple[tuple[str, Any], ...]]
CASES = [
    ("llama", torch.bfloat16),
    ("llama", torch.int8),
    ("qwen3", torch.float8_e4m3fn),  # normed queries and keys
    ("gpt2", torch.bfloat16),  # nothing turns
    ("gptj", torch.bfloat16),  # neighbours turn
    ("bloom", torch.bfloat16),  # slopes
    ("gemma3", torch.bfloat16),  # windows and rotations of two kinds
    ("gpt_oss", torch.int8),  # sinks
]


def variant(made: Launch) -> Variant:
    """What Triton compiles anew for: constants, what is there at all, and types."""
    kernel = made.kernel
    given = {p.name: p.default for p in kernel.params if p.has_default}
    given |= dict(zip(kernel.arg_names, made.args)) | made.options
    constants = {p.name for p in kernel.params if p.is_constexpr}

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        return value if name in constants or value is None else type(value)

    return kernel.fn.__name__, tuple(sorted((n, kind(n, v)) for n, v in given.items()))


def of_a_step(
    decoder: Decoder, cache: Cache, counts: list[int], lengths: list[int]
) -> set[Variant]:
    table = scattered_pages(len(counts), 12)[0]
    rows = rows_in_pages(counts, lengths, table)
    with torch.inference_mode(), pretend(DEVICES[90]) as kept:
        decoder(torch.ones(sum(counts), dtype=torch.long), rows, cache)
        return {variant(one) for one in kept}


@pytest.mark.parametrize(("label", "page_dtype"), CASES)
def test_what_runs_was_tried(label: str, page_dtype: torch.dtype, tmp_path: Path) -> None:
    make(label, tmp_path)
    decoder = load(tmp_path, dtype=torch.bfloat16)
    cache = Cache(decoder.config, 24, 4, page_dtype)
    with pretend(DEVICES[90]) as kept:
        for probe in probes(decoder.config, cache, torch.bfloat16):
            for name in ("attention", "store"):
                for trial in KERNELS[name].trial(probe):
                    KERNELS[name](*trial.args, **trial.kwargs)
        tried = {variant(one) for one in kept}
    ran = of_a_step(decoder, cache, [1, 1], [7, 5]) | of_a_step(decoder, cache, [40, 1], [40, 3])
    ran = {one for one in ran if one[0] in ("_short", "_long", "_store")}
    assert {"_short", "_long", "_store"} <= {name for name, _ in ran}
    assert not ran - tried
