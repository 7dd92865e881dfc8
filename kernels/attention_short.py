"""Attention of rows with few queries: decode, draft verification.

Such a row is cut along its context into parts, so that few rows fill a GPU. Where it is cut
depends on its own length alone, never on its neighbours, so its result is the same bits in every
batch; who computes a part depends on the batch, and may. The last block to finish a row's parts
merges them. Rows that read the same first pages have these read once for all, as parts of their
own (`_shared`).
"""

from kernels.attention_tile import FREE, LOG2E, MOST_PARTS, find, normal, part_size, put_part, tile
from kernels.backend import tl, triton

# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=FREE)
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
        shared = tl.cdiv(low, part_size(low))
    size = part_size(length - low)
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
        top, total, acc = tile(
            q, top, total, acc, n, length, position, position, page_table + row * width, head,
            slope, keys, values, key_scales, value_scales, inner, outer, window,
            KV_HEADS, DIM, PADDED, PAGE, BLOCK, True, SOFTCAP,
        )  # fmt: skip
        if ((n + BLOCK - low) % size == 0) & (n + BLOCK < end):
            target = (base + (n - low) // size) * (QUERIES * GROUP) + m
            put_part(top, total, acc, target, valid, partial, levels, DIM, PADDED)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, PADDED], tl.float32)

    if parts + shared == 1:
        done, _level = normal(top, total, acc, sink)
        places = (at * (KV_HEADS * GROUP) + mine)[:, None] * DIM + d[None, :]
        tl.store(out + places, done.to(q.dtype), mask=known)
        return
    target = (base + last - 1) * (QUERIES * GROUP) + m
    put_part(top, total, acc, target, valid, partial, levels, DIM, PADDED)
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


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=FREE)
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
    group = find(group_starts, group_count, block, MEMBERS)
    start = tl.load(group_starts + group)
    count = tl.load(group_starts + group + 1) - start
    first = (block - (start // MEMBERS + group)) * MEMBERS
    end = tl.load(group_tokens + group)
    size = part_size(end)
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
        top, total, acc = tile(
            q, top, total, acc, n, end, limit, position, table, head,
            slope, keys, values, key_scales, value_scales, inner, outer, None,
            KV_HEADS, DIM, PADDED, PAGE, BLOCK, True, SOFTCAP,
        )  # fmt: skip
    target = (row * KV_HEADS + head).to(tl.int64) * slots + slots // 2 + part
    target = target * (SHORT * GROUP) + m % GROUP
    put_part(top, total, acc, target, valid, partial, levels, DIM, PADDED)
