"""The mixture-of-experts product: every token visits its k chosen experts.

y[t] = Σ_j probabilities[t, j] · down_e(gate(up_e(x[t]))),  e = chosen[t, j]

The sum over j runs in the order of choice and in float32, so that a token's result does not
depend on which other tokens share its experts.

In Triton: `_route` sorts the visits by expert; `_up` and `_down` multiply blocks of visits to
one expert; `_combine` brings a token's visits together. How many visits an expert gets is known
to the device alone, so the grid has room for any way they may fall, and idle blocks return.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import KINDS, apply_gate, gate
from kernels.backend import Call, Kernel, Probe, launch, tl, triton
from kernels.config import Key, configured, runs


def experts_reference(
    x: Tensor,
    chosen: Tensor,
    probabilities: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    limit: float = 0.0,
) -> Tensor:
    """One product per expert that is used, over the tokens that use it."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(up)).tolist()
    parts = []
    for expert, mine in enumerate(torch.split(order, counts)):
        if len(mine):
            bias = None if up_bias is None else up_bias[expert]
            inner = gate(F.linear(x[mine // chosen.shape[1]], up[expert], bias), kind, limit)
            bias = None if down_bias is None else down_bias[expert]
            parts.append(F.linear(inner, down[expert], bias))
    visits = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1)
    exact = torch.promote_types(x.dtype, torch.float32)
    return (visits.to(exact) * probabilities.to(exact)[..., None]).sum(1).to(x.dtype)


@triton.jit
def _route(chosen, order, begins, count, BLOCK: tl.constexpr):
    """One program an expert: its visits, in order of token, to its part of `order`."""
    expert = tl.program_id(0)
    before = 0
    for at in range(0, count, BLOCK):
        visit = at + tl.arange(0, BLOCK)
        before += tl.sum(
            (tl.load(chosen + visit, visit < count, other=1 << 30) < expert).to(tl.int32)
        )
    tl.store(begins + expert, before)
    if expert == tl.num_programs(0) - 1:
        tl.store(begins + expert + 1, count)
    for at in range(0, count, BLOCK):
        visit = at + tl.arange(0, BLOCK)
        mine = (tl.load(chosen + visit, visit < count, other=-1) == expert).to(tl.int32)
        tl.store(order + before + tl.cumsum(mine) - 1, visit, mine > 0)
        before += tl.sum(mine)


@triton.jit
def _find(begins, block, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> the expert that a block of visits belongs to (EXPERTS: none), its first visit, its end"""
    expert = tl.arange(0, PADDED)
    begin = tl.load(begins + expert, expert < EXPERTS, other=0)
    end = tl.load(begins + expert + 1, expert < EXPERTS, other=0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    past = tl.cumsum(blocks)  # blocks of this expert and those before
    found = tl.sum(((past <= block) & (expert < EXPERTS)).to(tl.int32))
    first = tl.sum(tl.where(expert == found, begin + (block - past + blocks) * BLOCK_M, 0))
    return found, first, tl.sum(tl.where(expert == found, end, 0))


@triton.jit
def _up(
    x, weight, bias, order, begins, y, per_token, hidden, ff, limit,
    KIND: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [visits by expert, ff] = gate(x of each visit's token · up)"""
    expert, first, end = _find(begins, tl.program_id(0), EXPERTS, PADDED, BLOCK_M)
    if expert >= EXPERTS:
        return
    visit = first + tl.arange(0, BLOCK_M)
    token = tl.load(order + visit, visit < end, other=0) // per_token
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tl.where(n < ff, n, 0)
    k = tl.arange(0, BLOCK_K)
    mine = (visit < end)[:, None]  # the rest of the block is not read
    rows = x + token[:, None].to(tl.int64) * hidden + k[None, :]
    gates = weight + (expert.to(tl.int64) * 2 * ff + there[None, :]) * hidden + k[:, None]
    ups = gates + ff.to(tl.int64) * hidden
    left = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    right = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, hidden, BLOCK_K):
        if MASKED:
            a = tl.load(rows + at, mine & (at + k[None, :] < hidden), other=0.0)
            g = tl.load(gates + at, at + k[:, None] < hidden, other=0.0)
            u = tl.load(ups + at, at + k[:, None] < hidden, other=0.0)
        else:
            a = tl.load(rows + at, mine, other=0.0)
            g = tl.load(gates + at)
            u = tl.load(ups + at)
        left = tl.dot(a, g, left, input_precision="ieee")
        right = tl.dot(a, u, right, input_precision="ieee")
    if bias is not None:
        left += tl.load(bias + expert * 2 * ff + n, n < ff, other=0.0).to(tl.float32)[None, :]
        right += tl.load(bias + (expert * 2 + 1) * ff + n, n < ff, other=0.0).to(tl.float32)[
            None, :
        ]
    found = apply_gate(left, right, limit, KIND).to(y.dtype.element_ty)
    to = y + visit[:, None].to(tl.int64) * ff + n[None, :]
    tl.store(to, found, (visit[:, None] < end) & (n[None, :] < ff))


@triton.jit
def _down(
    x, weight, bias, order, begins, y, ff, hidden,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [tokens · k, hidden]: each visit's row back at its place"""
    expert, first, end = _find(begins, tl.program_id(0), EXPERTS, PADDED, BLOCK_M)
    if expert >= EXPERTS:
        return
    visit = first + tl.arange(0, BLOCK_M)
    place = tl.load(order + visit, visit < end, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tl.where(n < hidden, n, 0)
    k = tl.arange(0, BLOCK_K)
    mine = (visit < end)[:, None]  # the rest of the block is not read
    rows = x + visit[:, None].to(tl.int64) * ff + k[None, :]
    columns = weight + (expert.to(tl.int64) * hidden + there[None, :]) * ff + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, ff, BLOCK_K):
        if MASKED:
            a = tl.load(rows + at, mine & (at + k[None, :] < ff), other=0.0)
            b = tl.load(columns + at, at + k[:, None] < ff, other=0.0)
        else:
            a = tl.load(rows + at, mine, other=0.0)
            b = tl.load(columns + at)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + expert * hidden + n, n < hidden, other=0.0).to(tl.float32)[None, :]
    to = y + place[:, None].to(tl.int64) * hidden + n[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), (visit[:, None] < end) & (n[None, :] < hidden))


@triton.jit
def _combine(visits, probabilities, y, per_token, hidden, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in range(per_token):
        visit = token * per_token + j
        row = tl.load(visits + visit * hidden + n, n < hidden, other=0.0)
        acc += row.to(tl.float32) * tl.load(probabilities + visit).to(tl.float32)
    tl.store(y + token * hidden + n, acc.to(y.dtype.element_ty), n < hidden)


class Config(NamedTuple):
    block: int  # visits of an expert that are found, or outputs that are made, at once
    depth: int  # inputs of a step
    warps: int
    stages: int


# By the bytes of a number and the visits of a tile. Float32 has no tensor cores, and what does not
# fit into registers spills.
CONFIGS: dict[Key, Config] = {
    ("route",): Config(1024, 0, 4, 1),
    ("combine",): Config(1024, 0, 4, 1),
    (2, 16): Config(64, 64, 4, 3),
    (2, 32): Config(64, 64, 4, 3),
    (2, 64): Config(64, 64, 4, 3),
    (4, 16): Config(32, 32, 4, 2),
    (4, 32): Config(32, 32, 4, 2),
    (4, 64): Config(32, 32, 8, 2),
}


def _launch(
    x: Tensor,
    chosen: Tensor,
    probabilities: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    limit: float = 0.0,
) -> Tensor:
    (tokens, hidden), per_token = x.shape, chosen.shape[1]
    count, ff, visits = len(up), down.shape[2], chosen.numel()
    order = torch.empty(visits, dtype=torch.int32, device=x.device)
    begins = torch.empty(count + 1, dtype=torch.int32, device=x.device)
    route, combine = (configured(CONFIGS, x.device, kind) for kind in ("route", "combine"))
    sizes = {"BLOCK": route.block, **runs(route)}
    launch(_route, (count,), chosen.contiguous(), order, begins, visits, **sizes)

    m = _block_m(visits, count)
    # An expert's last block may be partly filled; no more experts than visits have one.
    blocks = min(visits, visits // m + count)
    sizes = {"EXPERTS": count, "PADDED": triton.next_power_of_2(count), "BLOCK_M": m}
    inner, found, y = x.new_empty(visits, ff), x.new_empty(visits, hidden), torch.empty_like(x)
    config = configured(CONFIGS, x.device, x.element_size(), m)
    n, k = config.block, config.depth
    fit = {"BLOCK_N": n, "BLOCK_K": k, **runs(config)}
    launch(
        _up, (blocks, triton.cdiv(ff, n)), x.contiguous(), up, up_bias, order, begins, inner,
        per_token, hidden, ff, float(limit),
        KIND=KINDS.index(kind), MASKED=hidden % k != 0, **sizes, **fit,
    )  # fmt: skip
    launch(
        _down, (blocks, triton.cdiv(hidden, n)), inner, down, down_bias, order, begins, found,
        ff, hidden, MASKED=ff % k != 0, **sizes, **fit,
    )  # fmt: skip
    grid, sizes = (tokens, triton.cdiv(hidden, combine.block)), {"BLOCK": combine.block}
    shares = probabilities.contiguous()
    launch(_combine, grid, found, shares, y, per_token, hidden, **sizes, **runs(combine))
    return y


def _block_m(visits: int, count: int) -> int:
    """About an expert's even share of visits: a smaller block reads the weights more often."""
    return max(16, min(64, triton.next_power_of_2(visits // count)))


def _trial(probe: Probe) -> Iterator[Call]:
    count, per_token, ff = 4, 2, 64
    up = probe.random(count, 2 * ff, probe.hidden, seed=1) / probe.hidden**0.5
    down = probe.random(count, probe.hidden, ff, seed=2) / ff**0.5
    biases = probe.random(count, 2 * ff, seed=3), probe.random(count, probe.hidden, seed=4)
    for tokens, kind, limit in ((3, "swigluoai", 7.0), (130, "silu", 0.0)):
        chosen = (torch.arange(2 * tokens) * 7 % 5 % 4).view(tokens, per_token)
        chosen[:, 1] = (chosen[:, 0] + 1 + chosen[:, 1] % 3) % count
        shares = torch.linspace(0, 1, 2 * tokens).view(tokens, per_token)
        x = probe.random(tokens, probe.hidden)
        at = (x, chosen.to(probe.device), shares.to(probe.device), up, down)
        with_biases = biases if limit else (None, None)
        yield Call((*at, *with_biases), {"kind": kind, "limit": limit})


EXPERTS = Kernel("experts", experts_reference, _launch, _trial)


def experts(
    x: Tensor,
    chosen: Tensor,
    probabilities: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    limit: float = 0.0,
) -> Tensor:
    """x [n, hidden], chosen [n, k] int64, probabilities [n, k], up [experts, 2 · ff, hidden],
    down [experts, hidden, ff], biases [experts, 2 · ff] and [experts, hidden] -> [n, hidden]"""
    if up.shape[1] != 2 * down.shape[2]:
        raise ValueError(f"up gives {up.shape[1]} channels, down wants 2 · {down.shape[2]}")
    if x.shape[1] != up.shape[2]:
        raise ValueError(f"x has {x.shape[1]} channels and the experts take {up.shape[2]}")
    if len(x) == 0:
        return x.clone()
    found: Tensor = EXPERTS(
        x, chosen, probabilities, up, down, up_bias, down_bias, kind=kind, limit=limit
    )
    return found
