"""Attention over pages in Triton; `attention.py` says what it computes, this page how.

Queries of a row and the heads that share a key head are packed as the M side of one tile:
m = query · GROUP + head. Logits are in powers of two, since the hardware's exponential is 2^x.

Short rows (decode, draft verification) are cut along their context into parts, so that few rows
fill a GPU. Where a row is cut depends on its own length alone, never on its neighbours, so its
result is the same bits in every batch; who computes a part depends on the batch, and may. The
last block to finish a row's parts merges them. Long rows (prefill) are not cut. Rows that read
the same first pages have these read once for all, as parts of their own (`_shared`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import counters, describe, launch, tl, triton
from kernels.sharing import Shared

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_PART = tl.constexpr(128)  # tokens; a smaller part writes more than 3 % of what it reads
MOST_PARTS = tl.constexpr(32)  # 32k tokens at batch 1 and 8 key heads: 256 blocks for 132 SMs


# What differs from step to step and must not compile a kernel anew.
_FREE = ["starts", "lengths", "page_table", "width", "row_count", "window", "skips", "slots"]
_FREE += ["members", "group_starts", "group_tokens", "group_count", "arrivals"]


@triton.jit
def _widen(x, dtype: tl.constexpr):
    """Page contents as operands; bytes are fp8 e4m3 for GPUs that cannot convert it."""
    if x.dtype == tl.uint8:  # the bits of a float16 2⁸ times smaller, subnormals included
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)
    return x.to(dtype)


@triton.jit
def _tile(
    q, top, total, acc, begin, end, limit, position, table, head, slope,
    keys, values, key_scales, value_scales, inner, outer, window,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over tokens begin … begin + BLOCK of the row of `table`."""
    n = begin + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    if PAGE % BLOCK == 0:  # the tile lies in one page
        page = tl.load(table + begin // PAGE).to(tl.int64)
        slot = (page * KV_HEADS + head) * PAGE + begin % PAGE + tl.arange(0, BLOCK)
    else:
        page = tl.load(table + n // PAGE, mask=n < end, other=0).to(tl.int64)
        slot = (page * KV_HEADS + head) * PAGE + n % PAGE
    k = tl.load(keys + slot[None, :] * DIM + d[:, None], mask=d[:, None] < DIM, other=0.0)
    logits = tl.dot(q, _widen(k, q.dtype), input_precision="ieee") * inner
    if key_scales is not None:
        logits *= tl.load(key_scales + slot)[None, :]
    if SOFTCAP:
        logits = outer * (2 * tl.sigmoid(2 * logits) - 1)  # tanh
    if slope is not None:
        logits += slope[:, None] * (n[None, :] - position[:, None])
    known = d[None, :] < DIM
    if MASKED:
        seen = n[None, :] <= limit[:, None]
        if window is not None:
            seen = seen & (n[None, :] > position[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        known = known & (n[:, None] < end)  # beyond may be nan, which 0 · v would spread
    v = tl.load(values + slot[:, None] * DIM + d[None, :], mask=known, other=0.0)
    higher = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: no inf − inf
    weights = tl.exp2(logits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    if value_scales is not None:
        weights *= tl.load(value_scales + slot, mask=n < end, other=0)[None, :]
    acc = tl.dot(
        weights.to(q.dtype), _widen(v, q.dtype), acc * fade[:, None], input_precision="ieee"
    )
    return higher, total, acc


@triton.jit
def _normal(top, total, acc, sink):
    """→ acc over the denominator, and the denominator's logarithm; nothing seen: 0 and −inf"""
    if sink is not None:
        higher = tl.maximum(top, sink)
        fade = tl.exp2(top - higher)
        total = total * fade + tl.exp2(sink - higher)
        acc = acc * fade[:, None]
        top = higher
    empty = total == 0
    level = tl.where(empty, float("-inf"), top + tl.log2(total))
    return acc / tl.where(empty, 1.0, total)[:, None], level


@triton.jit
def _part_size(span):
    """Tokens of one part: the smallest power of two that cuts span into at most MOST_PARTS."""
    size = LEAST_PART
    while size * MOST_PARTS < span:
        size *= 2
    return size


@triton.jit
def _find(starts, count, block, PER: tl.constexpr):
    """The row of query block `block`, when row r begins at block starts[r] // PER + r."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // PER + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _put_part(
    top, total, acc, target, valid, partial, levels,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Parts are normalised, so that merging needs one number a part and head: its level."""
    d = tl.arange(0, PADDED)
    out, level = _normal(top, total, acc, None)
    tl.store(levels + target, level, mask=valid)
    places = partial + target[:, None] * DIM + d[None, :]
    tl.store(places, out, mask=valid[:, None] & (d[None, :] < DIM))


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_FREE)
def _short(
    query, keys, values, key_scales, value_scales, out, partial, levels, arrivals,
    slots, stride, starts, lengths, page_table, width, skips, sinks, slopes, inner, outer, window,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, key heads, blocks a row): block z computes its share of the row's parts."""
    row, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    QUERIES: tl.constexpr = ROWS // GROUP
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    if (count == 0) | (count > QUERIES):
        return
    length = tl.load(lengths + row)
    low = 0
    if window is not None:
        low = tl.maximum(length - count + 1 - window, 0) // BLOCK * BLOCK
    shared = 0  # parts that `_shared` has computed
    if skips is not None:
        low = tl.load(skips + row)
        shared = tl.cdiv(low, _part_size(low))
    size = _part_size(length - low)
    parts = tl.maximum(tl.cdiv(length - low, size), 1)
    blocks = tl.num_programs(2)
    first = parts * z // blocks
    last = parts * (z + 1) // blocks
    if first == last:
        return

    m = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    valid = m // GROUP < count
    position = length - count + m // GROUP
    at = (start + m // GROUP).to(tl.int64)
    mine = head * GROUP + m % GROUP
    known = valid[:, None] & (d[None, :] < DIM)
    q = tl.load(query + (at * stride + mine * DIM)[:, None] + d[None, :], mask=known, other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + mine).to(tl.float32) * LOG2E
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + mine).to(tl.float32) * LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    base = (row * KV_HEADS + head).to(tl.int64) * slots  # of this row's and head's parts
    begin = low + first * size
    end = tl.minimum(low + last * size, length)
    for n in range(begin, end, BLOCK):
        top, total, acc = _tile(
            q, top, total, acc, n, length, position, position, page_table + row * width, head,
            slope, keys, values, key_scales, value_scales, inner, outer, window,
            KV_HEADS, DIM, PADDED, PAGE, BLOCK, True, SOFTCAP,
        )  # fmt: skip
        if ((n + BLOCK - low) % size == 0) & (n + BLOCK < end):
            target = (base + (n - low) // size) * (QUERIES * GROUP) + m
            _put_part(top, total, acc, target, valid, partial, levels, DIM, PADDED)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, PADDED], tl.float32)

    if parts + shared == 1:
        done, _level = _normal(top, total, acc, sink)
        places = (at * (KV_HEADS * GROUP) + mine)[:, None] * DIM + d[None, :]
        tl.store(out + places, done.to(q.dtype), mask=known)
        return
    target = (base + last - 1) * (QUERIES * GROUP) + m
    _put_part(top, total, acc, target, valid, partial, levels, DIM, PADDED)
    tl.debug_barrier()  # all threads' parts are written before the one that counts says so
    here = tl.atomic_add(arrivals + row * KV_HEADS + head, 1, sem="acq_rel")
    if here < tl.minimum(parts, blocks) - 1:
        return
    tl.store(arrivals + row * KV_HEADS + head, 0)  # ready for the next launch
    tl.debug_barrier()
    s = tl.arange(0, MOST_PARTS)  # the row's own parts …
    used = s < parts
    if skips is not None:  # … and from the middle on those of `_shared`
        s = tl.arange(0, 2 * MOST_PARTS)
        used = (s < parts) | ((s >= slots // 2) & (s < slots // 2 + shared))
    for i in range(count * GROUP):
        source = (base + s) * (QUERIES * GROUP) + i
        level = tl.load(levels + source, mask=used, other=float("-inf"), cache_modifier=".cg")
        highest = tl.max(level, 0)
        if sinks is not None:
            one_sink = tl.load(sinks + head * GROUP + i % GROUP).to(tl.float32) * LOG2E
            highest = tl.maximum(highest, one_sink)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(level - highest)
        sum_ = tl.sum(weight, 0)
        if sinks is not None:
            sum_ += tl.exp2(one_sink - highest)
        part = tl.load(
            partial + source[:, None] * DIM + d[None, :],
            mask=used[:, None] & (d[None, :] < DIM), other=0, cache_modifier=".cg",
        )  # fmt: skip
        merged = tl.sum(part * weight[:, None], 0) / tl.where(sum_ == 0, 1.0, sum_)
        place = ((start + i // GROUP) * KV_HEADS + head).to(tl.int64) * GROUP + i % GROUP
        tl.store(out + place * DIM + d, merged.to(q.dtype), mask=d < DIM)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_FREE)
def _long(
    query, keys, values, key_scales, value_scales, out,
    stride, starts, lengths, page_table, width, row_count, sinks, slopes, inner, outer, window,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHORT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks of all rows, key heads); rows of at most SHORT queries are `_short`'s."""
    QUERIES: tl.constexpr = ROWS // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: no long tail
    head = tl.program_id(1)
    row = _find(starts, row_count, block, QUERIES)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    first = (block - (start // QUERIES + row)) * QUERIES
    if (first >= count) | (count <= SHORT):
        return
    length = tl.load(lengths + row)
    before = length - count + first  # position of the block's first query
    end = tl.minimum(before + QUERIES, length)

    m = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    valid = (m // GROUP < QUERIES) & (first + m // GROUP < count)
    position = before + m // GROUP
    at = (start + first + m // GROUP).to(tl.int64)
    mine = head * GROUP + m % GROUP
    known = valid[:, None] & (d[None, :] < DIM)
    q = tl.load(query + (at * stride + mine * DIM)[:, None] + d[None, :], mask=known, other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + mine).to(tl.float32) * LOG2E
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + mine).to(tl.float32) * LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    table = page_table + row * width
    low = 0
    if window is not None:
        low = tl.maximum(before + 1 - window, 0) // BLOCK * BLOCK
    else:
        low = (before + 1) // BLOCK * BLOCK  # before it every query sees every key
        for n in range(0, low, BLOCK):
            top, total, acc = _tile(
                q, top, total, acc, n, end, position, position, table, head,
                slope, keys, values, key_scales, value_scales, inner, outer, window,
                KV_HEADS, DIM, PADDED, PAGE, BLOCK, False, SOFTCAP,
            )  # fmt: skip
    for n in range(low, end, BLOCK):
        top, total, acc = _tile(
            q, top, total, acc, n, end, position, position, table, head,
            slope, keys, values, key_scales, value_scales, inner, outer, window,
            KV_HEADS, DIM, PADDED, PAGE, BLOCK, True, SOFTCAP,
        )  # fmt: skip
    done, _level = _normal(top, total, acc, sink)
    places = (at * (KV_HEADS * GROUP) + mine)[:, None] * DIM + d[None, :]
    tl.store(out + places, done.to(q.dtype), mask=known)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_FREE)
def _shared(
    query, keys, values, key_scales, value_scales, partial, levels,
    slots, stride, starts, lengths, page_table, width, slopes, inner, outer,
    members, group_starts, group_tokens, group_count,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SHORT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (member blocks of all groups, key heads, MOST_PARTS): one part for many rows at once."""
    MEMBERS: tl.constexpr = ROWS // GROUP
    block, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = _find(group_starts, group_count, block, MEMBERS)
    start = tl.load(group_starts + group)
    count = tl.load(group_starts + group + 1) - start
    first = (block - (start // MEMBERS + group)) * MEMBERS
    end = tl.load(group_tokens + group)
    size = _part_size(end)
    if (first >= count) | (part * size >= end):
        return

    m = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    valid = (m // GROUP < MEMBERS) & (first + m // GROUP < count)
    row = tl.load(members + start + first + m // GROUP, mask=valid, other=0)
    at = tl.load(starts + row).to(tl.int64)
    mine = head * GROUP + m % GROUP
    known = valid[:, None] & (d[None, :] < DIM)
    q = tl.load(query + (at * stride + mine * DIM)[:, None] + d[None, :], mask=known, other=0.0)
    position = tl.load(lengths + row) - 1
    end = tl.minimum(end, (part + 1) * size)
    limit = tl.full([ROWS], 0, tl.int32) + (end - 1)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + mine).to(tl.float32) * LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    table = page_table + tl.load(members + start) * width
    for n in range(part * size, end, BLOCK):
        top, total, acc = _tile(
            q, top, total, acc, n, end, limit, position, table, head,
            slope, keys, values, key_scales, value_scales, inner, outer, None,
            KV_HEADS, DIM, PADDED, PAGE, BLOCK, True, SOFTCAP,
        )  # fmt: skip
    target = (row * KV_HEADS + head).to(tl.int64) * slots + slots // 2 + part
    target = target * (SHORT * GROUP) + m % GROUP
    _put_part(top, total, acc, target, valid, partial, levels, DIM, PADDED)


class Config(NamedTuple):
    rows: int  # M side of the tile
    block: int  # keys a step
    warps: int
    stages: int  # steps in flight


# By what runs, the head's padded width and the bytes of a number in pages. `rows` is the least; it
# grows with queries and group. Chosen for no spills in the ahead-of-time compile, not yet by time.
CONFIGS: dict[tuple[str, int, int], Config] = {
    ("short", 64, 2): Config(16, 64, 4, 3),
    ("short", 128, 2): Config(16, 64, 4, 3),
    ("short", 256, 2): Config(16, 32, 4, 3),
    ("short", 64, 1): Config(16, 64, 4, 3),
    ("short", 128, 1): Config(16, 64, 4, 3),
    ("short", 256, 1): Config(16, 32, 4, 3),
    ("long", 64, 2): Config(128, 64, 8, 3),
    ("long", 128, 2): Config(128, 32, 8, 3),
    ("long", 256, 2): Config(64, 32, 8, 2),
    ("long", 64, 1): Config(128, 64, 8, 3),
    ("long", 128, 1): Config(128, 32, 8, 3),
    ("long", 256, 1): Config(64, 32, 8, 2),
    ("shared", 64, 2): Config(64, 64, 4, 3),
    ("shared", 128, 2): Config(64, 32, 4, 3),
    ("shared", 256, 2): Config(64, 32, 8, 2),
    ("shared", 64, 1): Config(64, 64, 8, 3),
    ("shared", 128, 1): Config(64, 32, 4, 3),
    ("shared", 256, 1): Config(64, 32, 8, 2),
}
EXACT = Config(16, 16, 4, 2)  # float32, without tensor cores

# Where an architecture differs. wgmma keeps K and V out of registers, so sm_90 takes longer steps.
BY_ARCH: dict[tuple[int, str, int, int], Config] = {
    (90, "long", 128, 2): Config(128, 64, 8, 3),
    (90, "shared", 128, 2): Config(64, 64, 4, 3),
    (120, "shared", 64, 2): Config(64, 32, 4, 3),
}

# Where slopes, or a group that is no power of two, take the registers that were left.
TIGHT: dict[tuple[int, str, int, int], Config] = {
    (80, "long", 128, 2): Config(64, 32, 8, 3),
}

MOST_ROWS_SHORT = 32  # of queries × group; more are better off in `_long`


def configure(arch: int, kind: str, dim: int, bytes_: int, tight: bool) -> Config:
    key = kind, max(64, _power(dim)), bytes_
    if bytes_ == 4:
        return EXACT
    found = BY_ARCH.get((arch, *key)) or CONFIGS[key]
    return TIGHT.get((arch, *key), found) if tight else found


def attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    scale: float,
    longest_query: int,
    longest_context: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """As `attention`: one launch for short rows, one for long and one for shared pages, if any."""
    _, heads, dim = query.shape
    kv_heads, page = keys.shape[1:3]
    device, rows, group = describe(query.device), lengths.shape[0], heads // kv_heads
    if keys.dtype == torch.float8_e4m3fn and device.arch < 89:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    if query.stride()[1:] != (dim, 1):
        query = query.contiguous()
    tile = _tile_of_short(longest_query, group)
    queries = tile // group
    span = min(longest_context, window + longest_query) if window else longest_context
    most = min(MOST_PARTS.value, _ceil(span + 64, LEAST_PART.value))
    shared = None if window else shared
    slots = most if shared is None else 2 * most
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    common = {
        "query": query, "keys": keys, "values": values, "key_scales": key_scales,
        "value_scales": value_scales, "stride": query.stride(0), "starts": starts,
        "lengths": lengths, "page_table": page_table, "width": page_table.stride(0),
        "slopes": slopes, "inner": scale / softcap if softcap else scale * LOG2E.value,
        "outer": softcap * LOG2E.value, "GROUP": group, "KV_HEADS": kv_heads, "DIM": dim,
        "PADDED": max(16, _power(dim)), "PAGE": page, "SOFTCAP": softcap != 0,
    }  # fmt: skip
    parts = {
        "partial": query.new_empty(
            (rows, kv_heads, slots, queries * group, dim), dtype=torch.float32
        ),
        "levels": query.new_empty((rows, kv_heads, slots, queries * group), dtype=torch.float32),
        "slots": slots,
    }

    width = 4 if query.element_size() == 4 else keys.element_size()
    tight = slopes is not None or group != _power(group)

    def sizes_of(kind: str, least: int) -> dict[str, int]:
        if kind == "short" and least > MOST_ROWS_SHORT:
            kind = "shared"  # a wide group: tiles of this shape, and nothing to search
        config = configure(device.arch, kind, dim, width, tight)
        size = {"ROWS": max(config.rows, least), "BLOCK": config.block}
        return size | {"num_warps": config.warps, "num_stages": config.stages}

    if shared is not None:
        sizes = sizes_of("shared", _power(group))
        blocks = _blocks(shared.rows, shared.tokens, sizes["ROWS"] // group)
        launch(
            _shared, (blocks, kv_heads, most), **common, **parts, **sizes,
            members=shared.rows, group_starts=shared.starts, group_tokens=shared.tokens,
            group_count=len(shared.tokens), SHORT=queries,
        )  # fmt: skip
    blocks = min(most, _ceil(8 * device.processors, rows * kv_heads))
    launch(
        _short, (rows, kv_heads, blocks), **common, **parts, **sizes_of("short", tile),
        out=out, arrivals=counters(query.device, rows * kv_heads), window=window or None,
        skips=None if shared is None else shared.skips, sinks=sinks,
    )  # fmt: skip
    if longest_query > queries:
        sizes = sizes_of("long", _power(group))
        blocks = _blocks(query, lengths, sizes["ROWS"] // group)
        launch(
            _long, (blocks, kv_heads), **common, **sizes, out=out, row_count=rows, sinks=sinks,
            window=window or None, SHORT=queries,
        )  # fmt: skip
    return out


def _tile_of_short(longest_query: int, group: int) -> int:
    """The M side of short rows: all queries of this launch if they are few, or one a row."""
    tile = _power(longest_query * group)
    return max(16, tile if tile <= MOST_ROWS_SHORT else _power(group))


def _blocks(items: Tensor, rows: Tensor, a_block: int) -> int:
    """An upper bound of the blocks of all rows, that needs no number from the device."""
    return int(items.shape[0] // a_block + rows.shape[0])


def _power(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def _ceil(n: int, size: int) -> int:
    return -(-n // size)
