"""The CPU's own kernels against the twins, and bit for bit against themselves in other company."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.activation
import kernels.norm
import kernels.pages
import kernels.topk
from kernels import build, native
from kernels.attention import attention_reference
from kernels.linear import quantize_int4

try:
    BUILT = build.compiled()
except build.NotHere as why:
    pytest.skip(f"no native kernels here: {why}", allow_module_level=True)


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def chance(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Alone, and with others, however small the work."""
    monkeypatch.setattr(native, "GRAIN", 1)
    BUILT.use_threads(request.param)
    yield
    BUILT.use_threads(1)


SHAPES = [(1, 64, 96), (5, 33, 70), (12, 896, 32), (13, 7, 1), (40, 130, 257)]


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(rows: int, inner: int, out: int, dtype: torch.dtype) -> None:
    x, bias = chance(rows, inner), chance(out, seed=1)
    weight = chance(out, inner, seed=2).to(dtype)
    packed = native.pack(weight)
    assert torch.equal(native.unpack(packed), weight.float())
    exact = x.double() @ weight.double().T + bias
    close(native.linear(x, packed, bias).double(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_in_16_bits_is_itself(dtype: torch.dtype) -> None:
    """And its product with 1 too: subnormal numbers, the largest, and both zeros."""
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    weight = every[every.isfinite()].view(-1, 1)
    for found in (
        native.lookup(native.pack(weight), torch.arange(len(weight))),
        native.linear(torch.ones(1, 1), native.pack(weight)).T,
    ):
        assert torch.equal(found, weight.float())


@pytest.mark.parametrize("inner", [40, 43])
@pytest.mark.parametrize("dtype", native.KINDS[:4])
def test_some_rows_of_a_packed_weight(inner: int, dtype: torch.dtype) -> None:
    weight = (chance(70, inner) * 30).round().clamp(-127, 127).to(dtype)
    scales = chance(70, seed=1) if dtype == torch.int8 else None
    rows = torch.tensor([69, 0, 31, 32, 31])
    exact = weight[rows].float() * (1 if scales is None else scales[rows, None])
    assert torch.equal(native.lookup(native.pack(weight, scales), rows), exact)


@pytest.mark.parametrize("out", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_pack_takes_no_second_room_for_what_it_may_overwrite(out: int, dtype: torch.dtype) -> None:
    weight = (chance(out, 40) * 30).round().clamp(-127, 127).to(dtype)
    scales, place = torch.ones(out) if dtype == torch.int8 else None, weight.data_ptr()
    kept = native.pack(weight.clone(), scales)
    again = native.pack(weight, scales, own=True)
    assert (again.values.data_ptr() == place) == (out == 64)
    assert torch.equal(again.values, kept.values)
    if scales is not None:
        assert torch.equal(again.sums, native.unpack(kept).sum(1).int())  # type: ignore[arg-type]


@pytest.mark.skipif(not native.has_int8(), reason="this processor has no AVX-512 VNNI")
@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_linear_int8_is_exact_in_integers(rows: int, inner: int, out: int) -> None:
    """Against numbers that are whole already, nothing is rounded at all."""
    x = torch.randint(-127, 128, (rows, inner), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # so that a row's scale is 1
    values = torch.randint(-127, 128, (out, inner), generator=torch.Generator().manual_seed(1))
    scales = torch.full((out,), 0.5)
    packed = native.pack(values.to(torch.int8), scales)
    assert torch.equal(native.unpack(packed), values.float() * 0.5)
    assert torch.equal(native.linear(x, packed).double(), x.double() @ values.double().T * 0.5)


GROUPED = [(1, 64, 96, 32), (5, 72, 70, 24), (12, 896, 32, 128), (13, 8, 1, 8), (40, 192, 257, 64)]


@pytest.mark.skipif(not native.has_int8(), reason="this processor has no AVX-512 VNNI")
@pytest.mark.parametrize(("rows", "inner", "out", "group"), GROUPED)
def test_linear_int4_is_exact_in_integers(rows: int, inner: int, out: int, group: int) -> None:
    x = torch.randint(-127, 128, (rows, inner), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # so that a row's scale is 1
    values = torch.randint(-7, 8, (out, inner), generator=torch.Generator().manual_seed(1)).float()
    values[:, ::group] = 7
    powers = 2.0 ** torch.randint(-2, 3, (out, inner // group)).repeat_interleave(group, 1)
    weight = quantize_int4(values * powers, inner // group)
    packed, bias = native.pack(*weight), chance(out).round()
    assert torch.equal(native.unpack(packed), values * powers)
    exact = x.double() @ (values * powers).double().T + bias
    assert torch.equal(native.linear(x, packed, bias).double(), exact)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_row_is_the_same_in_any_company(kind: str) -> None:
    weight, x = chance(100, 260), chance(37, 260, seed=3)
    if kind.startswith("int") and not native.has_int8():
        pytest.skip("this processor has no AVX-512 VNNI")
    if kind == "int8":
        packed = native.pack((weight * 30).round().clamp(-127, 127).to(torch.int8), torch.ones(100))
    elif kind == "int4":
        weight, x = weight[:, :256], x[:, :256]
        packed = native.pack(*quantize_int4(weight, 4))
    else:
        packed = native.pack(weight.to(getattr(torch, kind)))
    together = native.linear(x, packed)
    for some in (slice(0, 1), slice(3, 10), slice(11, 36)):
        assert torch.equal(native.linear(x[some], packed), together[some])


def test_callers_on_many_threads() -> None:
    """Only one of them gets the workers; the others work alone, and all get the same."""
    packed = native.pack(chance(500, 300))
    inputs = [chance(9, 300, seed=seed) for seed in range(60)]
    expected = [native.linear(x, packed) for x in inputs]
    with ThreadPoolExecutor(4) as crowd:
        found = list(crowd.map(lambda x: native.linear(x, packed), inputs))
    assert all(map(torch.equal, found, expected))


def test_helpers_that_come_late() -> None:
    """More threads than cores, and others who want these: some helper loses its core in mid-work,
    after which fewer are asked for a while. Everyone gets the same."""
    packed, x = native.pack(chance(2000, 700)), chance(20, 700, seed=1)
    BUILT.use_threads(1)
    alone = native.linear(x, packed)
    BUILT.use_threads(16)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        assert all(torch.equal(native.linear(x, packed), alone) for _ in range(1000))
    finally:
        for one in spinning:
            one.kill()
            one.wait()


def paged(
    counts: list[int], lengths: list[int], heads: tuple[int, int], dim: int, page: int
) -> Any:
    width = max(-(-n // page) for n in lengths)
    order = torch.randperm(len(counts) * width, generator=torch.Generator().manual_seed(7))
    pages = chance(2, len(order), heads[1], page, dim)
    where = {
        "starts": torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int(),
        "lengths": torch.tensor(lengths).int(),
        "page_table": order.int().view(len(counts), width),
        "scale": dim**-0.5,
    }
    return chance(sum(counts), heads[0], dim, seed=1), pages[0], pages[1], where


ATTENTION: list[tuple[list[int], list[int], tuple[int, int], int, int, dict[str, Any]]] = [
    ([1, 3, 17], [40, 3, 33], (4, 2), 64, 16, {}),
    ([1, 5], [1200, 700], (14, 2), 64, 16, {}),
    ([7, 2], [9, 30], (7, 1), 96, 4, {"window": 5, "softcap": 20.0}),
    ([30], [30], (4, 4), 80, 16, {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}),
    (
        [3, 1],
        [600, 1],
        (4, 2),
        36,
        1,
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]), "window": 100},
    ),
    ([4], [20], (40, 1), 256, 64, {}),
    ([0, 2, 1, 0, 1], [0, 2, 0, 5, 64], (4, 2), 16, 16, {}),  # the third is padding
]


@pytest.mark.parametrize(("counts", "lengths", "heads", "dim", "page", "more"), ATTENTION)
def test_attention(
    counts: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    page: int,
    more: dict[str, Any],
) -> None:
    query, keys, values, where = paged(counts, lengths, heads, dim, page)
    found = native.attention(query, keys, values, **where, **more)
    close(found, attention_reference(query, keys, values, **where, **more))
    across = keys.mT.contiguous().mT  # as the cache has them
    assert torch.equal(native.attention(query, across, values, **where, **more), found)


WHOLE = [case for case in ATTENTION if case[3] % 16 == 0 and case[4] % 16 == 0]


@pytest.mark.parametrize(("counts", "lengths", "heads", "dim", "page", "more"), WHOLE)
def test_attention_in_bfloat16(
    counts: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    page: int,
    more: dict[str, Any],
) -> None:
    """Queries and shares are rounded too, to 8 bits; and the sums are not."""
    query, keys, values, where = paged(counts, lengths, heads, dim, page)
    keys, values = keys.mT.contiguous().mT.bfloat16(), values.bfloat16()
    found = native.attention(query, keys, values, **where, **more)
    wanted = attention_reference(query, keys, values, **where, **more)
    assert (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    assert (found - wanted).norm() <= 2**-8 * wanted.norm()


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_know_chunks(chunk: int, dtype: torch.dtype) -> None:
    """A prompt's last queries give the same bits whatever came with them in the step."""
    query, keys, values, where = paged([700], [700], (14, 2), 64, 16)
    keys, values = keys.mT.contiguous().mT.to(dtype), values.to(dtype)
    whole = native.attention(query, keys, values, **where)
    where["starts"] = torch.tensor([0, chunk]).int()
    assert torch.equal(native.attention(query[-chunk:], keys, values, **where), whole[-chunk:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_store(interleaved: bool, normed: bool) -> None:
    parts = chance(6, (4 + 2 + 2) * 24).split((96, 48, 48), -1)
    query, key, value = (part.unflatten(-1, (-1, 24)) for part in parts)
    weight = chance(24, seed=5) if normed else None
    slots = torch.tensor([5, 6, -1, 17, 0, 30])
    how: dict[str, Any] = {
        "table": chance(40, 16, seed=4),
        "at": torch.tensor([3, 4, 5, 9, 1, 39], dtype=torch.int32),  # as the runner has them
        "interleaved": interleaved,
        "query_norm": weight,
        "key_norm": weight,
        "eps": 1e-6,
    }
    keys, values, their_keys, their_values = torch.zeros(4, 8, 2, 4, 24)
    found = native.store(query, key, value, keys, values, slots, **how)
    reference = kernels.pages.store_reference
    close(found, reference(query, key, value, their_keys, their_values, slots, **how))
    close(keys, their_keys)
    assert torch.equal(values, their_values)
    across = torch.zeros(8, 2, 24, 4).mT
    native.store(query, key, value, across, values, slots, **how)
    assert torch.equal(across, keys)
    brief, brief_values = torch.zeros_like(across).bfloat16(), torch.zeros_like(values).bfloat16()
    native.store(query, key, value, brief, brief_values, slots, **how)
    assert torch.equal(brief, keys.bfloat16())
    assert torch.equal(brief_values, values.bfloat16())


def test_store_rounds_as_torch_does() -> None:
    """Halves to even, infinities and NaN as they are; 16 channels at a time, and one."""
    near = chance(2, 4, 32) * torch.tensor([1e-30, 1.0, 1e38, 1.0])[:, None]
    near[0, 1, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8])
    keys, values = torch.zeros(2, 1, 4, 16, 32).bfloat16().unbind()
    native.store(near, near, near, keys, values, torch.tensor([3, 9]))
    for pages in keys, values:
        found, wanted = pages[0][:, [3, 9]].transpose(0, 1), near.bfloat16()
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("width", [16, 96, 901])
def test_norms(width: int) -> None:
    x, added, weight, bias = (chance(*s, width, seed=i) for i, s in enumerate([(5,), (5,), (), ()]))
    close(
        native.norm(x, None, weight, None, 1e-6, True)[0],
        kernels.norm.rms_norm_reference(x, weight, 1e-6),
    )
    normed, total = native.norm(x, added, weight, bias, 1e-5, False)
    close(normed, kernels.norm.layer_norm_reference(x + added, weight, bias, 1e-5))
    assert torch.equal(total, x + added)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gates(kind: str) -> None:
    x = chance(3, 2 * 70) * 6
    close(native.gate(x, kind), kernels.activation.gate_reference(x, kind))


def test_the_exponential_is_right_to_the_last_bits() -> None:
    x = torch.linspace(-80, 80, 100_000)
    wanted = x.double() / (1 + (-x.double()).exp())
    assert ((native.activate(x, "silu") - wanted) / wanted).abs().max() < 3e-7


@pytest.mark.parametrize("width", [1, 16, 100, 4097])
def test_best(width: int) -> None:
    logits = chance(8, width)
    logits[1, width // 2] = -torch.inf
    logits[2], logits[3, -1], logits[4, 0] = -torch.inf, torch.nan, torch.inf
    logits[5] = 0.5  # the first of equals
    rows = torch.tensor([7, 2, 3, 4, 5, 1])
    found = native.best(logits, rows)
    wanted = logits[rows].argmax(-1)
    wanted[1:4] = -1
    if width == 1:
        wanted[5] = -1
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 5, 77, 1000, 20_000])
@pytest.mark.parametrize("normalise", [True, False])
def test_top(size: int, normalise: bool) -> None:
    """Equals by the smaller id, zeros equal, masked ones last; more blocks than k, and fewer."""
    logits = (chance(9, size, seed=size) * 8).round() / 4
    logits[:, 1::5] *= 0.0
    logits[:4, ::7] = -torch.inf
    logits[4] = -torch.inf
    logits[4, size // 2] = 1
    chosen = torch.arange(9) % size
    for k in {0, 1, min(5, size), min(300, size), size}:
        found = native.top(logits, k, chosen, normalise)
        wanted = kernels.topk.top_logprobs_reference(logits, k, chosen, normalise)
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[3], wanted[3])
        for mine, theirs in ((found[0], wanted[0]), (found[2], wanted[2])):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-6, equal_nan=True)
    logits[2, size // 2] = torch.nan
    values, _, scores, _ = native.top(logits, 1, None, normalise)
    assert values[2].isnan().all()
    assert scores[2].isnan()
    assert not values[[0, 1, 3, 5]].isnan().any() or size == 1


@pytest.mark.parametrize("size", [1, 5, 77, 20_000])
def test_log_softmax(size: int) -> None:
    """And the same bits as those of the best."""
    logits = chance(9, size, seed=size) * 8
    logits[:4, 1::7] = -torch.inf
    found = native.log_softmax(logits)
    torch.testing.assert_close(found, logits.double().log_softmax(-1).float(), rtol=1e-6, atol=2e-6)
    values, ids, _, _ = native.top(logits, size, None, True)
    assert torch.equal(found.gather(1, ids), values)
    logits[2, size // 2], logits[3] = torch.nan, -torch.inf
    found = native.log_softmax(logits)
    assert found[2:4].isnan().all()
    assert not found[4:].isnan().any()


def test_a_build_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails() -> None:
        tries.append("c++")
        raise build.NotHere("no compiler")

    monkeypatch.setattr(build, "_tried", cache(build._tried.__wrapped__))
    monkeypatch.setattr(build, "_built", fails)
    for _ in range(2):
        with pytest.raises(build.NotHere, match="no compiler"):
            build.compiled()
    assert not build.here()
    assert tries == ["c++"]
