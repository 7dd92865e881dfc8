"""Sampling in Triton; `sampling.py` says what it computes, this page how.

Four launches. In the first three a block has one part of a row: `_tops` finds the greatest logits,
`_weights` how much weighs and how many are above some edges, and `_pick` gathers, in order of id,
what is above the highest edge that filters cannot cut through. In the last a program has one row:
it draws from the part that the draw falls into if there are no filters, else from what was
gathered, and only if that is too much from the whole row. Weights are integers, so that sums of
parts are the sum, whoever adds them up.

Top-k, top-p and typical-p are one question, "down to which score?", and `_cut` answers it by
closing in on that score, four times closer a pass, and ends on a score that is there. A pass adds
up lane by lane; lanes meet once, at its end.
"""

import torch
from torch import Tensor

from kernels.backend import launch, tl, triton
from kernels.config import Config, Key, configured, runs

UNIT = tl.constexpr(float(1 << 40))  # the greatest weight
FAINT = tl.constexpr(27.8)  # exp(−27.8) · 2⁴⁰ < 1: who is so far below the greatest weighs nothing
CONFIGS: dict[Key, Config] = {
    ("part",): Config(2048, 4),  # logits: in `_sample` more would spill on sm_120
    ("draw",): Config(0, 8, 3),  # as many at once as a part has
}
STAGES = tl.constexpr(CONFIGS["draw",].stages)  # loops without a product must be told themselves
EDGES = tl.constexpr(8)  # the last is no edge: all of the row


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
    logits, size, top, inverse, floor, lightest, mean, share, whole, most,
    COUNT: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest score kept when the greatest are taken until they are `most` (COUNT), or hold
    `share` of the weight of x ≥ floor, w ≥ lightest, or of the `whole` where that is not 0. It is
    a score that is there.

    A score is kept if what is above it is not enough yet. The answer lies in (under, over]; three
    pivots a pass ask what is above them, and it lies between two that disagree. The same pass
    finds the least and the greatest score within, and once these are one, it is the answer.
    """
    infinity = float("inf")
    lows = tl.full([BLOCK], infinity, tl.float32)
    highs = tl.full([BLOCK], -infinity, tl.float32)
    counts = tl.zeros([BLOCK], tl.int64)
    for at in tl.range(0, size, BLOCK, num_stages=STAGES):
        s, w = _scores(logits, at, size, top, inverse, floor, lightest, mean, NEAR, BLOCK)
        lows = tl.minimum(lows, tl.where(s > -infinity, s, infinity))
        highs = tl.maximum(highs, s)
        counts += (s > -infinity).to(tl.int64) if COUNT else tl.where(s > -infinity, w, 0)
    low, over, all = tl.min(lows), tl.max(highs), tl.sum(counts).to(tl.float64)
    enough = most.to(tl.float64)
    if not COUNT:
        enough = share.to(tl.float64) * tl.where(whole > 0, whole, all)
    high = tl.where(all < enough, low, over)
    under = low - tl.maximum(high - low, tl.abs(low) * 1e-3)
    while low < high:
        step = (over - under) * 0.25
        p1, p2, p3 = under + step, under + 2 * step, under + 3 * step
        a1, a2, a3 = (tl.zeros([BLOCK], tl.int64),) * 3
        lows = tl.full([BLOCK], infinity, tl.float32)
        highs = tl.full([BLOCK], -infinity, tl.float32)
        for at in tl.range(0, size, BLOCK, num_stages=STAGES):
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
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        x = _load(logits, at, size, BLOCK)
        w = _weigh(x, top, inverse)
        total += tl.where(_kept(x, w, top, inverse, floor, lightest, mean, near), w, 0)
    return tl.sum(total)


@triton.jit
def _mean(logits, size, top, inverse, floor, lightest, BLOCK: tl.constexpr):
    """Σ w·z / Σ w of what is kept, z = log w up to rounding."""
    total, moment = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.float64)
    for at in tl.range(0, size, BLOCK, num_stages=STAGES):
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
def _depth(edge):
    """How far an edge lies below the greatest logit, in temperatures: ½, 2, 4½ … 24½."""
    step = (edge + 1).to(tl.float32)
    return tl.where(edge == EDGES - 1, float("inf"), 0.5 * step * step)


@triton.jit
def _above(x, top, depth, temperature):
    return top - x < depth * temperature  # −inf never is


@triton.jit
def _top(tops, row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(tops + row * parts + part, part < parts, other=-float("inf")))


@triton.jit
def _tops(logits, tops, firsts, size, BLOCK: tl.constexpr):
    """Grid (rows, parts), as the next two. The greatest logit of each part, and who has it first;
    what is not a number counts as infinite: no more can be drawn from either."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = _load(logits + row * size, part * BLOCK, size, BLOCK)
    x = tl.where(x == x, x, float("inf"))
    top = tl.max(x)
    id = part * BLOCK + tl.arange(0, BLOCK)
    place = row * tl.num_programs(1) + part
    tl.store(tops + place, top)
    tl.store(firsts + place, tl.min(tl.where(x == top, id, size)))


@triton.jit
def _weights(
    logits, settings, tops, masses, counts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """masses, counts [rows, parts, EDGES]: of what is above each edge"""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(settings + row * 5)
    top = _top(tops, row, tl.num_programs(1), PARTS)
    if (temperature <= 0) | (tl.abs(top) == float("inf")):
        return
    x = _load(logits + row * size, part * BLOCK, size, BLOCK)
    w = _weigh(x, top, tl.div_rn(1.0, temperature))
    place = (row * tl.num_programs(1) + part) * EDGES
    for edge in range(EDGES):
        above = _above(x, top, _depth(tl.full([], edge, tl.int32)), temperature)
        tl.store(masses + place + edge, tl.sum(tl.where(above, w, 0)))
        tl.store(counts + place + edge, tl.sum(above.to(tl.int32)))


@triton.jit
def _pick(
    logits, settings, tops, masses, counts, picked, values, ids, size,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """picked [rows]: how many values, ids [rows, BLOCK] hold all that filters keep; −1: too many"""
    row, mine = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    settings += row * 5
    temperature = tl.load(settings)
    top = _top(tops, row, parts, PARTS)
    if (temperature <= 0) | (tl.abs(top) == float("inf")):
        return
    top_k, top_p, min_p = tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3)
    edge, part = tl.arange(0, EDGES), tl.arange(0, PARTS)
    at = (row * parts + part[:, None]) * EDGES + edge[None, :]
    each = tl.load(counts + at, (part < parts)[:, None], other=0)
    count = tl.sum(each, 0)
    mass = tl.sum(tl.load(masses + at, (part < parts)[:, None], other=0), 0)
    total = tl.sum(tl.where(edge == EDGES - 1, mass, 0)).to(tl.float64)
    # An edge is safe when the first filter in force keeps nothing below it.
    safe = tl.exp(-_depth(edge)) * 1.01 < min_p
    safe = tl.where(top_p < 1, mass.to(tl.float64) >= top_p.to(tl.float64) * total, safe)
    safe = tl.where(top_k > 0, count.to(tl.float32) >= top_k, safe)
    chosen = tl.min(tl.where(safe, edge, EDGES))
    found = tl.sum(tl.where(edge == chosen, count, 0))
    if (chosen == EDGES) | (found > BLOCK):
        found = -1
    if mine == 0:
        tl.store(picked + row, found)
    if found >= 0:
        before = tl.where((edge == chosen)[None, :] & (part < mine)[:, None], each, 0)
        x = _load(logits + row * size, mine * BLOCK, size, BLOCK)
        above = _above(x, top, _depth(chosen), temperature)
        place = row * BLOCK + tl.sum(before) + tl.cumsum(above.to(tl.int32)) - 1
        tl.store(values + place, x, above)
        tl.store(ids + place, mine * BLOCK + tl.arange(0, BLOCK), above)


@triton.jit
def _sample(
    logits, bits, settings, tops, firsts, masses, picked, values, ids, tokens, size, parts,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    place, there = row * parts + part, part < parts
    top = _top(tops, row, parts, PARTS)
    if tl.abs(top) == float("inf"):
        tl.store(tokens + row, -1)
        return
    first = tl.load(tops + place, there, other=-float("inf")) == top
    token = tl.min(tl.where(first, tl.load(firsts + place, there, other=0), size))
    settings += row * 5
    temperature = tl.load(settings)
    if temperature > 0:
        top_k, top_p = tl.load(settings + 1), tl.load(settings + 2)
        min_p, typical_p = tl.load(settings + 3), tl.load(settings + 4)
        share = ((tl.load(bits + row) >> 11) & ((1 << 53) - 1)).to(tl.float64) * (2.0**-53)
        mass = tl.load(masses + place * EDGES + EDGES - 1, there, other=0)
        total = tl.sum(mass)
        if (top_k <= 0) & (top_p >= 1) & (min_p <= 0) & (typical_p >= 1):
            goal = tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)
            mine = tl.sum((tl.cumsum(mass) <= goal).to(tl.int32))
            past = tl.sum(tl.where(part < mine, mass, 0))
            x = _load(logits + row * size, mine * BLOCK, size, BLOCK)
            sums = past + tl.cumsum(_weigh(x, top, tl.div_rn(1.0, temperature)))
            token = mine * BLOCK + tl.sum((sums <= goal).to(tl.int32))
        else:
            found = tl.load(picked + row)
            source, length = logits + row * size, size
            if found >= 0:
                source, length = values + row * BLOCK, found
            token = _draw(
                source, length, top, total, share, temperature, top_k, top_p, min_p, typical_p,
                BLOCK,
            )  # fmt: skip
            if found >= 0:
                token = tl.load(ids + row * BLOCK + token)
    tl.store(tokens + row, token)


@triton.jit
def _draw(
    logits, size, top, total, share, temperature, top_k, top_p, min_p, typical_p,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The place of what is drawn; `total` weighs all of the row, of which these may be a part."""
    inverse = tl.div_rn(1.0, temperature)
    floor, lightest = top - FAINT * temperature, tl.full([], 1, tl.int64)
    mean, near, whole = 0.0, -float("inf"), tl.full([], 0, tl.float64)
    if top_k > 0:
        floor = _cut(
            logits, size, top, inverse, floor, lightest, mean, top_p, whole, top_k,
            COUNT=True, NEAR=False, BLOCK=BLOCK,
        )  # fmt: skip
    if top_p < 1:
        floor = _cut(
            logits, size, top, inverse, floor, lightest, mean, top_p,
            tl.where(top_k > 0, whole, total.to(tl.float64)), top_k,
            COUNT=False, NEAR=False, BLOCK=BLOCK,
        )  # fmt: skip
    if min_p > 0:
        lightest = tl.ceil(min_p.to(tl.float64) * UNIT).to(tl.int64)
    if typical_p < 1:
        mean = _mean(logits, size, top, inverse, floor, lightest, BLOCK)
        near = _cut(
            logits, size, top, inverse, floor, lightest, mean, typical_p, whole, top_k,
            COUNT=False, NEAR=True, BLOCK=BLOCK,
        )  # fmt: skip
    kept = _total(logits, 0, size, size, top, inverse, floor, lightest, mean, near, BLOCK)
    goal = tl.minimum((share * kept.to(tl.float64)).to(tl.int64), kept - 1)
    return _locate(logits, size, top, inverse, floor, lightest, mean, near, goal, BLOCK)


def launch_sample(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    logits, settings = logits.contiguous(), settings.contiguous()
    rows, size = logits.shape
    part, draw = (configured(CONFIGS, logits.device, kind) for kind in ("part", "draw"))
    block = part.block
    parts = triton.cdiv(size, block)
    tokens, ids, firsts, counts, picked, tops, values, masses = (
        torch.empty(rows, *shape, dtype=dtype, device=logits.device)
        for shape, dtype in (
            ((), torch.int64),
            ((block,), torch.int32),
            ((parts,), torch.int32),
            ((parts, EDGES.value), torch.int32),
            ((), torch.int32),
            ((parts,), torch.float32),
            ((block,), torch.float32),
            ((parts, EDGES.value), torch.int64),
        )
    )
    if not rows:
        return tokens
    sizes = {"PARTS": triton.next_power_of_2(parts), "BLOCK": block}
    grid = rows, parts
    launch(_tops, grid, logits, tops, firsts, size, BLOCK=block, **runs(part))
    launch(_weights, grid, logits, settings, tops, masses, counts, size, **sizes, **runs(part))
    launch(
        _pick, grid, logits, settings, tops, masses, counts, picked, values, ids, size,
        **sizes, **runs(part),
    )  # fmt: skip
    launch(
        _sample, (rows,), logits, bits, settings, tops, firsts, masses, picked, values, ids, tokens,
        size, parts, **sizes, **runs(draw),
    )  # fmt: skip
    return tokens
