"""Attention against the formula written out in float64, and the kernels against their twin."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_triton, sharing
from kernels.attention import attention, attention_reference, dense_attention
from kernels.attention_triton import attention_triton as run_triton
from kernels.backend import Call, Device, call, differs
from kernels.sharing import Shared, find_shared
from tests.kernels.poison import assert_cleared, poisoned


@dataclass
class Case:
    """A batch in pages that lie in random order, with nan wherever nothing was written."""

    counts: tuple[int, ...] = (1, 1, 5, 1, 9)
    lengths: tuple[int, ...] = (1, 40, 5, 33, 30)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    page: int = 16
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(f"{n}={v}" for n, v in vars(self).items() if v != getattr(Case, n)) or "-"

    def make(self) -> tuple[Call, list[tuple[Tensor, Tensor]]]:
        """→ the call, and each row's own keys and values [length, kv_heads, dim]"""
        maker = torch.Generator().manual_seed(self.seed)
        width = -(-max(self.lengths) // self.page) + 1
        pages = len(self.lengths) * width + 2
        order = torch.randperm(pages, generator=maker)[: len(self.lengths) * width]
        table = order.view(len(self.lengths), width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=maker).to(self.dtype)

        cache = torch.full((2, pages, self.kv_heads, self.page, self.dim), torch.nan)
        scales = torch.full(cache.shape[:-1], torch.nan)
        own = []
        for row, length in enumerate(self.lengths):
            at = torch.arange(length)
            page, offset = table[row, at // self.page], at % self.page
            both = random(2, length, self.kv_heads, self.dim).float()
            if self.page_dtype:
                scale = both.abs().amax(-1, keepdim=True) / 100
                both = (both / scale).to(self.page_dtype).float()
                scales[:, page, :, offset] = scale[..., 0].transpose(0, 1)
                own.append(tuple((both * scale).unbind(0)))
            else:
                own.append(tuple(both.unbind(0)))
            cache[:, page, :, offset] = both.transpose(0, 1)
        if self.page_dtype == torch.int8:
            cache = cache.nan_to_num(77)
        quantised = self.page_dtype is not None
        keys, values = cache.to(self.page_dtype or self.dtype)
        kwargs: dict[str, Any] = {
            "starts": torch.tensor([0, *self.counts]).cumsum(0).int(),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "page_table": table.int(),
            "scale": 1.3 * self.dim**-0.5,
            "longest_query": max(self.counts),
            "longest_context": max(self.lengths),
            "window": self.window,
            "softcap": self.softcap,
            "sinks": random(self.heads) if self.sinks else None,
            "slopes": random(self.heads).abs() if self.slopes else None,
            "key_scales": scales[0] if quantised else None,
            "value_scales": scales[1] if quantised else None,
        }
        query = random(sum(self.counts), self.heads, self.dim)
        return Call((query, keys, values), kwargs), own  # type: ignore[return-value]


def by_hand(made: Call, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The formula of kernels/attention.py, number by number in float64."""
    query, kwargs = made.args[0].double().numpy(), made.kwargs
    out = np.zeros_like(query)
    group = query.shape[1] // own[0][0].shape[1]
    token = 0
    for (key, value), count in zip(own, np.diff(kwargs["starts"].numpy())):
        k, v = key.double().numpy(), value.double().numpy()
        for i in range(count if len(k) else 0):
            p = len(k) - count + i
            first = max(0, p - kwargs["window"] + 1) if kwargs["window"] else 0
            j = np.arange(first, p + 1)
            for head in range(query.shape[1]):
                logits = kwargs["scale"] * k[j, head // group] @ query[token + i, head]
                if cap := kwargs["softcap"]:
                    logits = cap * np.tanh(logits / cap)
                if kwargs["slopes"] is not None:
                    logits = logits + kwargs["slopes"][head].double().item() * (j - p)
                e = np.exp(logits)
                rest = 0.0
                if kwargs["sinks"] is not None:
                    rest = np.exp(kwargs["sinks"][head].double().item())
                out[token + i, head] = e @ v[j, head // group] / (e.sum() + rest)
        token += count
    return torch.from_numpy(out)


FEATURES = [
    Case(),
    Case(window=7),
    Case(softcap=2.0),
    Case(sinks=True),
    Case(slopes=True),
    Case(window=3, softcap=5.0, sinks=True, slopes=True),
    Case(heads=3, kv_heads=3, dim=10),
    Case(heads=7, kv_heads=1, dim=20, page=5),
    Case(counts=(1,) * 6, lengths=(1, 16, 17, 300, 2, 100)),
    Case(counts=(0, 2, 1, 0, 1), lengths=(0, 2, 0, 5, 64)),
    Case(page_dtype=torch.int8),
    Case(page_dtype=torch.float8_e4m3fn, page=64, sinks=True),
]


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_the_twin_is_the_formula(case: Case) -> None:
    made, own = case.make()
    wide = Call(tuple(a.double() for a in made.args), made.kwargs)
    wanted = by_hand(made, own)
    if not case.page_dtype:
        exact = attention_reference(*wide.args, **wide.kwargs)
        assert torch.allclose(exact, wanted, rtol=1e-12, atol=1e-12)
    # Without Triton and on the CPU, `attention` is its twin or native code: one formula for both.
    ours = attention(*made.args, **made.kwargs)
    assert torch.allclose(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in FEATURES if not c.page_dtype], ids=str)
def test_dense_attention_is_attention_over_whole_rows(case: Case) -> None:
    lengths = tuple(n for n in case.lengths if n)
    whole = replace(case, counts=lengths, lengths=lengths)
    made, own = whole.make()
    names = ("starts", "scale", "window", "softcap", "sinks", "slopes")
    key, value = (torch.cat([row[i] for row in own]) for i in range(2))
    found = dense_attention(made.args[0], key, value, **{name: made.kwargs[name] for name in names})
    assert torch.allclose(found.double(), by_hand(made, own), rtol=1e-4, atol=1e-5)


def test_dense_attention_is_torchs() -> None:
    query, key, value = torch.randn(3, 2, 11, 4, 8)
    starts = torch.tensor([0, 11, 22], dtype=torch.int32)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = dense_attention(
        *(x.flatten(0, 1) for x in (query, key, value)), starts=starts, scale=8**-0.5
    )
    assert torch.allclose(found.view(2, 11, 4, 8), wanted.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("features", [{}, {"window": 2}, {"window": 2, "softcap": 3.0}])
def test_gradients_are_right(features: dict[str, Any]) -> None:
    starts = torch.tensor([0, 1, 4, 6, 9], dtype=torch.int32)
    parts = [torch.randn(9, heads, 3, dtype=torch.float64) for heads in (4, 2, 2)]
    for part in parts:
        part.requires_grad_()

    def run(*x: Tensor) -> Tensor:
        return dense_attention(*x, starts=starts, scale=0.5, **features)

    assert torch.autograd.gradcheck(run, parts)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": (3, 3, 16)}, "3 query heads of 16 cannot read keys"),
        ({"query": (3, 4, 8)}, "4 query heads of 8 cannot read keys"),
        ({"keys": (9, 2, 16, 16), "values": (8, 2, 16, 16)}, r"values \[8, 2, 16, 16\]"),
        ({"table": torch.int64}, "page_table is torch.int64: expected rows of int32"),
        ({"dtype": torch.int8}, "pages of torch.int8: scales belong to int8 and fp8 pages"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], sentence: str) -> None:
    shapes = {"query": (3, 4, 16), "keys": (9, 2, 16, 16), "values": (9, 2, 16, 16)} | change
    query, keys, values = (torch.zeros(shapes[n]) for n in ("query", "keys", "values"))
    with pytest.raises(ValueError, match=sentence):
        attention(
            query,
            keys.to(change.get("dtype", torch.float32)),
            values.to(change.get("dtype", torch.float32)),
            starts=torch.tensor([0, 3], dtype=torch.int32),
            lengths=torch.tensor([3], dtype=torch.int32),
            page_table=torch.zeros(1, 1, dtype=change.get("table", torch.int32)),
            scale=1.0,
            longest_query=3,
            longest_context=3,
        )


# ── the kernels, in Triton's interpreter ──────────────────────────────────────────────────────


def check(made: Call) -> Tensor:
    with poisoned():
        got = run_triton(*made.args, **made.kwargs)
    own = call(attention_reference, made)[:1]
    assert differs([got], own, call(attention_reference, made, exactly=True)[:1]) == ""
    assert_cleared()
    return got


HALF = torch.float16
LONG = Case(counts=(1, 40, 1, 3, 0, 1), lengths=(1, 75, 200, 150, 0, 0), dtype=HALF)
INTERPRETED = [
    LONG,
    replace(LONG, window=50, page=64, dim=64),
    replace(LONG, softcap=2.0, slopes=True, sinks=True),
    replace(LONG, page_dtype=torch.int8, window=70, sinks=True),
    replace(LONG, page_dtype=torch.float8_e4m3fn, page=128),
    replace(LONG, dtype=torch.float32, heads=7, kv_heads=1, dim=20, slopes=True),
    Case(counts=(1, 1, 1), lengths=(300, 17, 128), heads=3, kv_heads=3, dim=80, dtype=HALF),
    Case(counts=(4, 2, 1), lengths=(300, 2, 129), dim=96, dtype=HALF, sinks=True),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_the_kernels_are_the_twin(case: Case) -> None:
    check(case.make()[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("span", [127, 128, 129, 257])
def test_rows_are_cut_anywhere(span: int) -> None:
    check(Case(counts=(1, 1), lengths=(span, span + 64), dtype=HALF).make()[0])


@pytest.mark.interpreter
def test_a_row_is_the_same_bits_in_any_company() -> None:
    """Cut by its own length alone: other rows decide only who computes which part."""
    many = Case(counts=(1, 1, 40, 1), lengths=(300, 150, 60, 9), dtype=HALF).make()[0]
    together = check(many)
    starts = many.kwargs["starts"]
    for row in (0, 1, 3):
        alone = {
            "starts": torch.tensor([0, 1], dtype=torch.int32),
            "lengths": many.kwargs["lengths"][row : row + 1],
            "page_table": many.kwargs["page_table"][row : row + 1],
            "longest_query": 1,
            "longest_context": int(many.kwargs["lengths"][row]),
        }
        query = many.args[0][starts[row] : starts[row] + 1]
        one = check(Call((query, *many.args[1:]), many.kwargs | alone))
        assert torch.equal(one[0], together[starts[row]])


@pytest.mark.interpreter
def test_more_parts_than_blocks() -> None:
    """One block computes several parts of a row, as with many rows on a small GPU."""
    made = Case(counts=(1, 1, 1), lengths=(520, 129, 260), dtype=HALF).make()[0]
    with patch.object(attention_triton, "describe", lambda _: Device("small", 0, 1)):
        few = check(made)
    assert torch.equal(few, check(made))


def shared_case(page: int = 16, **features: Any) -> tuple[Call, Shared]:
    """Six rows: 0, 2, 3 begin with 256 tokens alike, 4 and 5 with 224, row 1 is alone."""
    case = Case(counts=(1,) * 6, lengths=(300, 20, 261, 257, 225, 400), page=page, **features)
    made, _ = case.make()
    table, lengths = made.kwargs["page_table"], made.kwargs["lengths"]
    for first, other, tokens in ((0, 2, 256), (0, 3, 256), (4, 5, 224)):
        table[other, : tokens // page] = table[first, : tokens // page]
    with patch.object(sharing, "LEAST", ((2, 200),)):
        shared = find_shared(np.ones(6, np.int32), lengths.numpy(), table.numpy(), page)
    assert shared is not None
    return made, shared


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "features",
    [
        {"dtype": HALF},
        {"dtype": HALF, "slopes": True, "sinks": True, "softcap": 3.0},
        {"dtype": HALF, "page_dtype": torch.int8, "heads": 6, "kv_heads": 1},
    ],
)
def test_shared_pages_change_no_result(features: dict[str, Any]) -> None:
    made, shared = shared_case(**features)
    check(Call(made.args, made.kwargs | {"shared": shared}))


def test_shared_rows_are_found() -> None:
    made, shared = shared_case()
    assert shared.rows.tolist() == [0, 2, 3, 4, 5]
    assert shared.starts.tolist() == [0, 3, 5]
    assert shared.tokens.tolist() == [256, 224]
    assert shared.skips.tolist() == [256, 0, 256, 256, 224, 224]
    assert torch.equal(
        attention_reference(*made.args, **made.kwargs, shared=shared),
        attention_reference(*made.args, **made.kwargs),
    )


@pytest.mark.parametrize(("rows", "tokens", "pays"), [(8, 208, 1), (8, 192, 0), (2, 208, 0)])
def test_few_shared_reads_are_not_worth_a_launch(rows: int, tokens: int, pays: int) -> None:
    table = np.arange(rows * 20, dtype=np.int32).reshape(rows, 20)
    table[:, : tokens // 16] = table[0, : tokens // 16]
    lengths = np.full(rows, 320, np.int32)
    assert (find_shared(lengths // 320, lengths, table, 16) is not None) == pays


def test_each_row_of_many_may_branch_off_a_page_later() -> None:
    table = np.tile(np.arange(700, dtype=np.int32), (600, 1))
    for row in range(600):
        table[row, 90 + row // 6 :] += 1000 * (row + 1)
    shared = find_shared(np.ones(600, np.int32), np.full(600, 11_000, np.int32), table, 16)
    assert shared is not None
    assert shared.tokens.tolist() == [90 * 16]


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [rows[:1], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [rows[0], *rest[i]], *rest[i + 1 :]]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_groups_would_save_more(seed: int) -> None:
    """Against every way to divide five rows, over page tables that branch like trees."""
    maker = np.random.default_rng(seed)
    table = maker.integers(0, 2, (5, 8)).astype(np.int32)
    table += 2 * np.arange(8, dtype=np.int32)  # a page is one place in the text
    for column in range(1, 8):  # rows that differ once never meet again
        table[:, column] += 100 * table[:, column - 1]
    page = 100
    lengths = maker.integers(201, 900, 5).astype(np.int32)
    own = (lengths - 1) // page

    def saved(rows: list[int]) -> int:
        common = 0
        while common < min(own[r] for r in rows) and len({table[r, common] for r in rows}) == 1:
            common += 1
        return (len(rows) - 1) * common

    best = max(sum(saved(group) for group in way) for way in partitions(list(range(5))))
    with patch.object(sharing, "LEAST", ((2, 200),)):
        shared = find_shared(np.ones(5, np.int32), lengths, table, page)
    found = 0
    if shared is not None:
        for group, tokens in enumerate(shared.tokens.tolist()):
            rows = shared.rows[shared.starts[group] : shared.starts[group + 1]].tolist()
            assert saved(rows) == (len(rows) - 1) * tokens // page
            assert all(shared.skips[r] == tokens < lengths[r] for r in rows)
            found += saved(rows)
    short = 4  # groups of one page save less than a launch costs, and are left out
    assert best - short <= found <= best
