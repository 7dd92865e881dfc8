"""Attention of rows with many queries: prefill. Queries fill the tiles, and rows are not cut."""

from kernels.attention_tile import FREE, LOG2E, find, normal, tile
from kernels.backend import tl, triton

# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=FREE)
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
    row = find(starts, row_count, block, QUERIES)
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
            top, total, acc = tile(
                q, top, total, acc, n, end, position, position, table, head,
                slope, keys, values, key_scales, value_scales, inner, outer, window,
                KV_HEADS, DIM, PADDED, PAGE, BLOCK, False, SOFTCAP,
            )  # fmt: skip
    for n in range(low, end, BLOCK):
        top, total, acc = tile(
            q, top, total, acc, n, end, position, position, table, head,
            slope, keys, values, key_scales, value_scales, inner, outer, window,
            KV_HEADS, DIM, PADDED, PAGE, BLOCK, True, SOFTCAP,
        )  # fmt: skip
    done, _level = normal(top, total, acc, sink)
    places = (at * (KV_HEADS * GROUP) + mine)[:, None] * DIM + d[None, :]
    tl.store(out + places, done.to(q.dtype), mask=known)
