"""What attention's kernels are made of: one step of the online softmax, and parts of a row.

Queries of a row and the heads that share a key head are packed as the M side of one tile:
m = query · GROUP + head. Logits are in powers of two, since the hardware's exponential is 2^x.
"""

from kernels.backend import tl, triton
from kernels.linear import widen

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_PART = tl.constexpr(128)  # tokens; a smaller part writes more than 3 % of what it reads
MOST_PARTS = tl.constexpr(32)  # 32k tokens at batch 1 and 8 key heads: 256 blocks for 132 SMs

# What differs from step to step and must not compile a kernel anew.
FREE = ["starts", "lengths", "page_table", "width", "row_count", "window", "skips", "slots"]
FREE += ["members", "group_starts", "group_tokens", "group_count", "arrivals"]


@triton.jit
def tile(
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
    logits = tl.dot(q, widen(k, q.dtype), input_precision="ieee") * inner
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
        weights.to(q.dtype), widen(v, q.dtype), acc * fade[:, None], input_precision="ieee"
    )
    return higher, total, acc


@triton.jit
def normal(top, total, acc, sink):
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
def part_size(span):
    """Tokens of one part: the smallest power of two that cuts span into at most MOST_PARTS."""
    size = LEAST_PART
    while size * MOST_PARTS < span:
        size *= 2
    return size


@triton.jit
def find(starts, count, block, PER: tl.constexpr):
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
def put_part(
    top, total, acc, target, valid, partial, levels,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Parts are normalised, so that merging needs one number a part and head: its level."""
    d = tl.arange(0, PADDED)
    out, level = normal(top, total, acc, None)
    tl.store(levels + target, level, mask=valid)
    places = partial + target[:, None] * DIM + d[None, :]
    tl.store(places, out, mask=valid[:, None] & (d[None, :] < DIM))
