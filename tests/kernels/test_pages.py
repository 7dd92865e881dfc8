"""Turning against transformers and complex numbers, writing and copying against plain loops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernels.backend import KERNELS, Call, Probe, call, differs
from kernels.pages import copy_pages, rotate, store

CPU = torch.device("cpu")
AT = torch.tensor([0, 5, 2, 31])


def angles(pairs: int, positions: int = 32) -> tuple[Tensor, Tensor]:
    """→ angles [positions, pairs], and the table made of them"""
    turns = torch.arange(positions)[:, None] / 10 ** torch.linspace(0, 3, pairs)
    return turns, torch.cat([turns.cos(), turns.sin()], dim=1)


def test_halves_turn_as_in_llama() -> None:
    turns, table = angles(8)
    x = torch.randn(4, 3, 16)
    both = torch.cat([turns, turns], dim=1)[AT][None]
    heads_first = x.transpose(0, 1)[None]
    wanted, _ = turn_llama(heads_first, heads_first, both.cos(), both.sin())
    assert torch.allclose(rotate(x, table, AT), wanted[0].transpose(0, 1), atol=1e-6)


def test_neighbours_turn_as_in_gptj() -> None:
    turns, table = angles(8)
    x = torch.randn(4, 3, 16)
    wanted = turn_gptj(x[None], turns.sin()[AT][None], turns.cos()[AT][None])[0]
    assert torch.allclose(rotate(x, table, AT, interleaved=True), wanted, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_channels_turn_as_complex_numbers(interleaved: bool) -> None:
    turns, table = angles(3)
    x = torch.randn(4, 2, 10, dtype=torch.float64)
    found = rotate(x, table.double(), AT, interleaved)
    assert torch.equal(found[..., 6:], x[..., 6:]), "the rest passes"
    even, odd = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    wanted = torch.complex(x[..., even], x[..., odd])
    wanted = wanted * torch.polar(torch.ones(4, 1, 3).double(), turns[AT][:, None].double())
    assert torch.allclose(found[..., even], wanted.real, atol=1e-6)
    assert torch.allclose(found[..., odd], wanted.imag, atol=1e-6)


def written(**changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Stores four tokens into five pages of four slots; → the query and all that took part."""
    maker = torch.Generator().manual_seed(3)
    parts = {n: torch.randn(4, h, 8, generator=maker) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    dtype = changes.pop("dtype", torch.float32)
    parts |= {name: torch.zeros(5, 2, 4, 8).to(dtype) for name in ("keys", "values")}
    parts["slots"] = torch.tensor([0, 7, -1, 18])
    query = store(*parts.values(), **changes)
    return query, parts


def test_each_token_lands_in_its_slot_and_nowhere_else() -> None:
    query, parts = written()
    assert torch.equal(query, parts["q"])
    for pages, given in ((parts["keys"], parts["k"]), (parts["values"], parts["v"])):
        for token, (page, offset) in ((0, (0, 0)), (1, (1, 3)), (3, (4, 2))):
            assert torch.equal(pages[page, :, offset], given[token])
            pages[page, :, offset] = 0
        assert not pages.any()


def test_queries_and_keys_are_normed_then_turned_and_values_are_neither() -> None:
    norms = [Qwen3RMSNorm(8, eps=1e-3) for _ in "qk"]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    _, table = angles(4)
    query_norm, key_norm = (norm.weight.detach() for norm in norms)
    query, parts = written(table=table, at=AT, query_norm=query_norm, key_norm=key_norm, eps=1e-3)
    with torch.no_grad():
        wanted_query, wanted_key = (
            rotate(norm(x), table, AT) for norm, x in zip(norms, (parts["q"], parts["k"]))
        )
    assert torch.allclose(query, wanted_query, atol=1e-6)
    assert torch.allclose(parts["keys"][4, :, 2], wanted_key[3], atol=1e-6)
    assert torch.equal(parts["values"][4, :, 2], parts["v"][3])


@pytest.mark.parametrize(("dtype", "step"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
def test_quantised_pages_keep_what_their_type_can(dtype: torch.dtype, step: float) -> None:
    scales = [torch.zeros(5, 2, 4) for _ in "kv"]
    _, parts = written(dtype=dtype, key_scales=scales[0], value_scales=scales[1])
    for pages, scale, given in zip(
        (parts["keys"], parts["values"]), scales, (parts["k"], parts["v"])
    ):
        back = pages[4, :, 2].float() * scale[4, :, 2, None]
        assert ((back - given[3]).abs() <= step * given[3].abs().amax(-1, keepdim=True)).all()
        assert torch.allclose(back.abs().amax(-1), given[3].abs().amax(-1)), "the largest is exact"


def test_zeros_are_quantised_to_zeros() -> None:
    zero = torch.zeros(1, 1, 8)
    pages, scales = torch.ones(1, 1, 4, 8).to(torch.int8), torch.ones(1, 1, 4)
    store(zero, zero, zero, pages, pages, torch.tensor([2]), key_scales=scales, value_scales=scales)
    assert not pages[0, 0, 2].any()


def test_pages_are_copied_in_all_layers_up_to_a_slot() -> None:
    cache = torch.randn(3, 2, 6, 2, 4, 8)
    wanted = cache.clone()
    for source, target, slots in ((0, 5, 4), (3, 1, 2), (2, 4, 0)):
        for slot in range(slots):
            wanted[:, :, target, :, slot] = cache[:, :, source, :, slot]
    copy_pages(cache, torch.tensor([[0, 5, 4], [3, 1, 2], [2, 4, 0]], dtype=torch.int32))
    assert torch.equal(cache, wanted)
    copy_pages(cache, torch.zeros(0, 3, dtype=torch.int32))
    assert torch.equal(cache, wanted)


def test_scales_are_copied_with_their_pages() -> None:
    scales = torch.randn(3, 2, 6, 2, 4)
    wanted = scales.clone()
    wanted[:, :, 1, :, :3] = scales[:, :, 5, :, :3]
    copy_pages(
        torch.zeros(3, 2, 6, 2, 4, 8).to(torch.int8),
        torch.tensor([[5, 1, 3]], dtype=torch.int32),
        scales,
    )
    assert torch.equal(scales, wanted)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": torch.int8}, "pages of torch.int8: scales belong"),
        ({"key_scales": torch.zeros(5, 2, 4)}, "pages of torch.float32: scales belong"),
        ({"key_norm": torch.ones(8)}, "query_norm and key_norm: expected both or neither"),
        ({"table": torch.ones(9, 8)}, "at must be the positions of 4 tokens, and is None"),
        (
            {"table": torch.ones(9, 12), "at": AT},
            r"table \[9, 12\]: expected \[positions, at most 8",
        ),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        written(**changes)


# ── the kernels, in Triton's interpreter ──────────────────────────────────────────────────────

USUAL = Probe(CPU, torch.float16, heads=6, kv_heads=3, head_dim=64)
VARIANTS = [
    USUAL,
    replace(USUAL, dtype=torch.float32, normed=True),
    replace(USUAL, interleaved=True, turned=20, head_dim=24),
    replace(USUAL, interleaved=True, normed=True),
    replace(USUAL, turned=32, head_dim=80, heads=9, kv_heads=9, normed=True),
    replace(USUAL, turned=0),
    replace(USUAL, turned=0, page_dtype=torch.int8),
    replace(USUAL, page_dtype=torch.int8, normed=True),
    replace(USUAL, page_dtype=torch.float8_e4m3fn, head_dim=96, page=64),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["rotate", "store", "copy_pages"])
@pytest.mark.parametrize("i", range(len(VARIANTS)))
def test_the_kernels_are_their_twins(name: str, i: int) -> None:
    kernel = KERNELS[name]
    torch.use_deterministic_algorithms(True)  # what is allocated and not written is nan
    try:
        for trial in kernel.trial(VARIANTS[i]):
            ways = call(kernel.triton, trial), call(kernel.twin, trial)
            assert differs(*ways, call(kernel.twin, trial, exactly=True)) == ""
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.interpreter
def test_fp8_of_our_own_is_torchs() -> None:
    """On GPUs that cannot convert it, bits are made by hand: all of them, and ties to even."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    between = (codes.sort().values[1:] + codes.sort().values[:-1]) / 2
    numbers = torch.cat([codes, between, between * 0.999, between * 1.001]).clamp(-448, 448)
    rows = -(-len(numbers) // 63)
    value = torch.zeros(1, rows, 64)
    value[..., 0] = 448.0  # so that the scale is 1
    value[..., 1:] = F.pad(numbers, (0, 63 * rows - len(numbers))).view(rows, 63)
    pages = [torch.zeros(1, rows, 1, 64).to(torch.float8_e4m3fn) for _ in "kv"]
    scales = torch.zeros(1, rows, 1)
    made = Call(
        (value, value, value, *pages, torch.tensor([0])),
        {"key_scales": scales, "value_scales": scales},
    )
    ways = KERNELS["store"].triton, KERNELS["store"].twin
    ours, torchs = (call(way, made)[4].float() for way in ways)
    assert torch.equal(ours, torchs)
