"""Turning, writing and copying in Triton; `pages.py` says what is computed."""

import torch
from torch import Tensor

from kernels.backend import describe, launch, tl, triton
from kernels.config import Config, Key, configured, runs

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

_FREE = ["slots", "at", "copies", "query_norm", "key_norm"]  # their alignment compiles nothing anew


@triton.jit
def _ready(
    x, head, table, at, norm, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The token at x: its heads [BLOCK] → normalised and turned, float32 [BLOCK, PADDED]"""
    d = tl.arange(0, PADDED)
    known = (head[:, None] < HEADS) & (d[None, :] < DIM)
    wide = tl.load(x + head[:, None] * DIM + d[None, :], mask=known, other=0.0).to(tl.float32)
    if norm is not None:
        spread = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
        wide *= spread * tl.load(norm + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        wide = wide.to(x.dtype.element_ty).to(tl.float32)
    if PAIRS:
        turns = d < 2 * PAIRS
        if INTERLEAVED:
            first, pair = d % 2 == 0, d // 2
            a, b = tl.split(tl.reshape(wide, [wide.shape[0], PADDED // 2, 2]))
            other = tl.reshape(tl.join(b, a), [wide.shape[0], PADDED])
        else:
            first = d < PAIRS
            pair = tl.where(first, d, d - PAIRS)
            partner = tl.where(first, d + PAIRS, d - PAIRS)
            near = (head[:, None] < HEADS) & turns[None, :]
            other = tl.load(x + head[:, None] * DIM + partner[None, :], mask=near, other=0.0)
            other = other.to(tl.float32)
            if norm is not None:
                other *= spread * tl.load(norm + partner, mask=turns, other=0.0)[None, :]
                other = other.to(x.dtype.element_ty).to(tl.float32)
        row = table + at * (2 * PAIRS) + pair
        cos = tl.load(row, mask=turns, other=1.0)
        sin = tl.load(row + PAIRS, mask=turns, other=0.0)
        wide = wide * cos[None, :] + other * tl.where(first, -sin, sin)[None, :]
    return wide.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _put(
    x, head, pages, scales, slot,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Heads x [BLOCK, PADDED] of one token into their place in pages."""
    d = tl.arange(0, PADDED)
    there = (head < HEADS) & (slot >= 0)
    place = (slot // PAGE * HEADS + head) * PAGE + slot % PAGE
    if scales is not None:
        largest = 127.0 if pages.dtype.element_ty == tl.int8 else 448.0
        scale = tl.max(tl.abs(x), 1) / largest
        tl.store(scales + place, scale, mask=there)
        x = x / tl.maximum(scale, 1e-30)[:, None]
        if pages.dtype.element_ty == tl.int8:
            x = (x + 12582912.0) - 12582912.0  # 1.5 · 2²³: rounds to even
        x = tl.minimum(tl.maximum(x, -largest), largest)
        if pages.dtype.element_ty == tl.uint8:
            x = _e4m3(x)
    known = there[:, None] & (d[None, :] < DIM)
    tl.store(pages + place[:, None] * DIM + d[None, :], x.to(pages.dtype.element_ty), mask=known)


@triton.jit
def _e4m3(x):
    """The bits of fp8 e4m3 of |x| ≤ 448, ties to even, for GPUs that cannot convert."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 15  # in steps of 2⁻⁹
    return ((bits >> 24) & 0x80) | tl.where(size < 0x3C800000, small, normal)  # below 2⁻⁶


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_FREE)
def _store(
    query, key, value, out, keys, values, key_scales, value_scales,
    query_stride, key_stride, value_stride, slots, table, at, query_norm, key_norm, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of heads): first the query's, if there is an `out`, key's, value's."""
    token = tl.program_id(0).to(tl.int64)
    QUERY_BLOCKS: tl.constexpr = 0 if out is None else (HEADS + BLOCK - 1) // BLOCK
    KEY_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK - 1) // BLOCK
    block = tl.program_id(1) - QUERY_BLOCKS
    d = tl.arange(0, PADDED)
    turned_at = token
    if PAIRS:
        turned_at = tl.load(at + token).to(tl.int64)
    if out is not None:  # noqa: SIM102 known when compiled, unlike
        if block < 0:
            head = (block + QUERY_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            x = _ready(
                query + token * query_stride, head, table, turned_at, query_norm, eps,
                HEADS, DIM, PADDED, PAIRS, INTERLEAVED,
            )  # fmt: skip
            known = (head[:, None] < HEADS) & (d[None, :] < DIM)
            places = out + (token * HEADS + head)[:, None] * DIM + d[None, :]
            tl.store(places, x.to(out.dtype.element_ty), mask=known)
            return
    if keys is not None:
        slot = tl.load(slots + token)
        head = block % KEY_BLOCKS * BLOCK + tl.arange(0, BLOCK)
        if block < KEY_BLOCKS:
            x = _ready(
                key + token * key_stride, head, table, turned_at, key_norm, eps,
                KV_HEADS, DIM, PADDED, PAIRS, INTERLEAVED,
            )  # fmt: skip
            _put(x, head, keys, key_scales, slot, KV_HEADS, DIM, PADDED, PAGE)
        else:
            x = _ready(
                value + token * value_stride, head, None, turned_at, None, eps,
                KV_HEADS, DIM, PADDED, 0, False,
            )  # fmt: skip
            _put(x, head, values, value_scales, slot, KV_HEADS, DIM, PADDED, PAGE)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_FREE)
def _copy(
    cache, scales, copies, pages,
    HEADS: tl.constexpr, PAGE: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (copies, layers · 2, blocks of a page's [kv_heads · page] tokens of WORDS words)."""
    copy = copies + 3 * tl.program_id(0)
    count = tl.load(copy + 2)
    t = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    w = tl.arange(0, PADDED)
    layer = tl.program_id(1).to(tl.int64) * pages
    inside = t[:, None] * WORDS + w[None, :]
    there = (t % PAGE < count) & (t < HEADS * PAGE)
    known = there[:, None] & (w[None, :] < WORDS)
    source = (layer + tl.load(copy)) * (HEADS * PAGE)
    target = (layer + tl.load(copy + 1)) * (HEADS * PAGE)
    words = tl.load(cache + source * WORDS + inside, mask=known)
    tl.store(cache + target * WORDS + inside, words, mask=known)
    if scales is not None:
        tl.store(scales + target + t, tl.load(scales + source + t, mask=there), mask=there)


CONFIGS: dict[Key, Config] = {
    ("store",): Config(8, 2),  # heads: 1024 channels of 128, two 16-byte loads a thread
    ("copy",): Config(16384, 4),  # bytes
}


def store_triton(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor | None,
    *,
    table: Tensor | None = None,
    at: Tensor | None = None,
    interleaved: bool = False,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    tokens, heads, dim = query.shape
    query = _dense(query)
    key, value = (None if x is None else _dense(x) for x in (key, value))
    if keys is not None and values is not None:
        keys, values = _writable(keys), _writable(values)
    out = None
    if table is not None or query_norm is not None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    kv_heads = 0 if keys is None else keys.shape[1]
    config = configured(CONFIGS, query.device, "store")
    blocks = -(-heads // config.block) if out is not None else 0
    blocks += 2 * -(-kv_heads // config.block)
    launch(
        _store, (tokens, blocks), query, key, value, out, keys, values, key_scales, value_scales,
        query.stride(0), key.stride(0) if key is not None else 0,
        value.stride(0) if value is not None else 0, slots, table, at, query_norm, key_norm, eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PADDED=_power(dim),
        PAIRS=0 if table is None else table.shape[1] // 2, INTERLEAVED=interleaved,
        PAGE=0 if keys is None else keys.shape[2], BLOCK=config.block, **runs(config),
    )  # fmt: skip
    return query if out is None else out


def rotate_triton(x: Tensor, table: Tensor, at: Tensor, interleaved: bool = False) -> Tensor:
    return store_triton(
        x, None, None, None, None, None, table=table, at=at, interleaved=interleaved
    )


def copy_pages_triton(cache: Tensor, copies: Tensor, scales: Tensor | None = None) -> None:
    layers, _, pages, heads, page, dim = cache.shape
    words = dim * cache.element_size() // 4
    padded = _power(words)
    config = configured(CONFIGS, cache.device, "copy")
    block = min(_power(heads * page), config.block // (4 * padded))
    grid = copies.shape[0], layers * 2, -(-heads * page // block)
    launch(
        _copy, grid, cache.view(torch.int32), scales, copies, pages,
        HEADS=heads, PAGE=page, WORDS=words, PADDED=padded, BLOCK=block, **runs(config),
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """Tokens may lie apart, as in a slice of q | k | v; their heads may not."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _writable(pages: Tensor) -> Tensor:
    """fp8 as bytes for GPUs before sm_89, which cannot convert it."""
    bits = pages.dtype == torch.float8_e4m3fn and describe(pages.device).arch < 89
    return pages.view(torch.uint8) if bits else pages


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
