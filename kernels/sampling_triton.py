"""Sampling in Triton; `sampling.py` says what it computes, this page how.

One program has one row and passes over it several times, all but the first time in the L2 cache.
Top-k, top-p and typical-p are one question, "down to which score?", and `_cut` answers it by
closing in on that score, four times closer a pass, and ends on a score that is there. A pass adds
up lane by lane; lanes meet once, at its end.
"""

import torch
from torch import Tensor

from kernels.backend import launch, tl, triton

UNIT = tl.constexpr(float(1 << 40))  # the greatest weight
FAINT = tl.constexpr(27.8)  # exp(−27.8) · 2⁴⁰ < 1: who is so far below the greatest weighs nothing
TILE = 2048  # logits at once: 16 bytes a lane of 16 warps; twice as many spill on sm_120


@triton.jit
def _load(logits, at, size, BLOCK: tl.constexpr):
    id = at + tl.arange(0, BLOCK)
    return tl.load(logits + id, id < size, other=-float("inf"))


@triton.jit
def _weigh(x, top, inverse):
    return (tl.exp((x - top) * inverse) * UNIT).to(tl.int64)


@triton.jit
def _scores(
    logits, at, size, top, inverse, floor, lightest, mean, NEAR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What a cut is made by: the logit, or how near to typical; −inf of what is not kept. And w."""
    x = _load(logits, at, size, BLOCK)
    w = _weigh(x, top, inverse)
    s = -tl.abs((x - top) * inverse - mean) if NEAR else x
    return tl.where((x >= floor) & (w >= lightest), s, -float("inf")), w


@triton.jit
def _cut(
    logits, size, top, inverse, floor, lightest, mean, share, most,
    COUNT: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest score kept when the greatest are taken until they are `most` (COUNT), or hold
    `share` of the weight of x ≥ floor, w ≥ lightest. It is a score that is there.

    A score is kept if what is above it is not enough yet. The answer lies in (under, over]; three
    pivots a pass ask what is above them, and it lies between two that disagree. The same pass
    finds the least and the greatest score within, and once these are one, it is the answer.
    """
    infinity = float("inf")
    lows = tl.full([BLOCK], infinity, tl.float32)
    highs = tl.full([BLOCK], -infinity, tl.float32)
    counts = tl.zeros([BLOCK], tl.int64)
    for at in tl.range(0, size, BLOCK, num_stages=3):
        s, w = _scores(logits, at, size, top, inverse, floor, lightest, mean, NEAR, BLOCK)
        lows = tl.minimum(lows, tl.where(s > -infinity, s, infinity))
        highs = tl.maximum(highs, s)
        counts += (s > -infinity).to(tl.int64) if COUNT else tl.where(s > -infinity, w, 0)
    low, over, all = tl.min(lows), tl.max(highs), tl.sum(counts).to(tl.float64)
    enough = most.to(tl.float64) if COUNT else share.to(tl.float64) * all
    high = tl.where(all < enough, low, over)
    under = low - tl.maximum(high - low, tl.abs(low) * 1e-3)
    while low < high:
        step = (over - under) * 0.25
        p1, p2, p3 = under + step, under + 2 * step, under + 3 * step
        a1, a2, a3 = (tl.zeros([BLOCK], tl.int64),) * 3
        lows = tl.full([BLOCK], infinity, tl.float32)
        highs = tl.full([BLOCK], -infinity, tl.float32)
        for at in tl.range(0, size, BLOCK, num_stages=3):
            s, w = _scores(logits, at, size, top, inverse, floor, lightest, mean, NEAR, BLOCK)
            counted = tl.full([BLOCK], 1, tl.int64) if COUNT else w
            a1 += tl.where(s > p1, counted, 0)
            a2 += tl.where(s > p2, counted, 0)
            a3 += tl.where(s > p3, counted, 0)
            lows = tl.minimum(lows, tl.where(s > under, s, infinity))
            highs = tl.maximum(highs, tl.where(s > over, -infinity, s))
        low, high = tl.min(lows), tl.max(highs)
        if tl.sum(a1).to(tl.float64) < enough:
            over = p1
        elif tl.sum(a2).to(tl.float64) < enough:
            under, over = p1, p2
        elif tl.sum(a3).to(tl.float64) < enough:
            under, over = p2, p3
        else:
            under = p3
        over = tl.minimum(over, high)
    return low


@triton.jit
def _kept(x, w, top, inverse, floor, lightest, mean, near):
    return (x >= floor) & (w >= lightest) & (-tl.abs((x - top) * inverse - mean) >= near)


@triton.jit
def _total(
    logits, begin, end, size, top, inverse, floor, lightest, mean, near, BLOCK: tl.constexpr
):  # fmt: skip
    """Σ w of what is kept of begin … end."""
    total = tl.zeros([BLOCK], tl.int64)
    for at in tl.range(begin, end, BLOCK, num_stages=3):
        x = _load(logits, at, size, BLOCK)
        w = _weigh(x, top, inverse)
        total += tl.where(_kept(x, w, top, inverse, floor, lightest, mean, near), w, 0)
    return tl.sum(total)


@triton.jit
def _mean(logits, size, top, inverse, floor, lightest, BLOCK: tl.constexpr):
    """Σ w·z / Σ w of what is kept, z = log w up to rounding."""
    total, moment = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.float64)
    for at in tl.range(0, size, BLOCK, num_stages=3):
        x = _load(logits, at, size, BLOCK)
        w = _weigh(x, top, inverse)
        kept = (x >= floor) & (w >= lightest)
        z = ((x - top) * inverse).to(tl.float64)
        total += tl.where(kept, w, 0)
        moment += tl.where(kept, w.to(tl.float64) * z, 0.0)
    return (tl.sum(moment) / tl.sum(total).to(tl.float64)).to(tl.float32)


@triton.jit
def _locate(
    logits, size, top, inverse, floor, lightest, mean, near, goal, BLOCK: tl.constexpr
):  # fmt: skip
    """The first id whose running sum exceeds the goal. Halves are summed until one tile is left,
    which reads the row once more; in that tile ids are counted."""
    low, high = 0, (size + BLOCK - 1) // BLOCK
    past = tl.zeros([], tl.int64)
    while high - low > 1:
        middle = (low + high) // 2
        half = _total(
            logits, low * BLOCK, middle * BLOCK, size, top, inverse, floor, lightest, mean, near,
            BLOCK,
        )  # fmt: skip
        if past + half <= goal:
            past += half
            low = middle
        else:
            high = middle
    x = _load(logits, low * BLOCK, size, BLOCK)
    w = _weigh(x, top, inverse)
    kept = _kept(x, w, top, inverse, floor, lightest, mean, near)
    sums = past + tl.cumsum(tl.where(kept, w, 0))
    return low * BLOCK + tl.sum((sums <= goal).to(tl.int32))


@triton.jit
def _sample(logits, bits, settings, tokens, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    infinity = float("inf")
    best = tl.full([BLOCK], -infinity, tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for at in tl.range(0, size, BLOCK, num_stages=3):
        x = _load(logits, at, size, BLOCK)
        bad |= (x != x).to(tl.int32)
        where = tl.where(x > best, at + tl.arange(0, BLOCK), where)
        best = tl.where(x > best, x, best)
    top = tl.max(best)
    if (tl.max(bad) > 0) | (tl.abs(top) == infinity):
        tl.store(tokens + row, -1)
        return
    token = tl.min(tl.where(best == top, where, size))
    settings += row * 5
    temperature = tl.load(settings)
    if temperature > 0:
        top_k, top_p = tl.load(settings + 1), tl.load(settings + 2)
        min_p, typical_p = tl.load(settings + 3), tl.load(settings + 4)
        inverse = tl.div_rn(1.0, temperature)
        floor, lightest = top - FAINT * temperature, tl.full([], 1, tl.int64)
        mean, near = 0.0, -infinity
        if top_k > 0:
            floor = _cut(
                logits, size, top, inverse, floor, lightest, mean, top_p, top_k,
                COUNT=True, NEAR=False, BLOCK=BLOCK,
            )  # fmt: skip
        if top_p < 1:
            floor = _cut(
                logits, size, top, inverse, floor, lightest, mean, top_p, top_k,
                COUNT=False, NEAR=False, BLOCK=BLOCK,
            )  # fmt: skip
        if min_p > 0:
            lightest = tl.ceil(min_p.to(tl.float64) * UNIT).to(tl.int64)
        if typical_p < 1:
            mean = _mean(logits, size, top, inverse, floor, lightest, BLOCK)
            near = _cut(
                logits, size, top, inverse, floor, lightest, mean, typical_p, top_k,
                COUNT=False, NEAR=True, BLOCK=BLOCK,
            )  # fmt: skip
        total = _total(logits, 0, size, size, top, inverse, floor, lightest, mean, near, BLOCK)
        share = ((tl.load(bits + row) >> 11) & ((1 << 53) - 1)).to(tl.float64) * (2.0**-53)
        goal = tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)
        token = _locate(logits, size, top, inverse, floor, lightest, mean, near, goal, BLOCK)
    tl.store(tokens + row, token)


def launch_sample(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    logits = logits.contiguous()
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        launch(
            _sample, (rows,), logits, bits, settings.contiguous(), tokens, size,
            BLOCK=TILE, num_warps=16,
        )  # fmt: skip
    return tokens
