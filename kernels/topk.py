"""Log-softmax, the k best of it, and where one given id stands.

logprob[v] = logit[v] − log Σ exp(logit)
rank       = 1 + how many logits are strictly greater than the chosen one

The best fall by logit, and of equals the smaller id comes first. The sum of a row never depends
on other rows, or near-equal beams would change places with the batch.

In Triton a row is cut into parts of one size; each gives the sum of its exponentials and its k
best (`_part`), and one program a row puts them together, always in the same order (`_merge`).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import native
from kernels.backend import Call, Kernel, Probe, launch, tl, triton
from kernels.config import Config, Key, configured, runs

Top = tuple[Tensor, Tensor, Tensor, Tensor]
Way = Callable[[Tensor, int, Tensor | None, bool], Top]

CONFIGS: dict[Key, Config] = {
    ("part",): Config(4096, 8),  # logits: 16 keys a thread stay in registers, 32 parts of 131k ids
    ("merge",): Config(0, 4),  # all that the parts have left
}
MOST = 128  # more than so many best are torch's to sort: the API lists 20, beams 2 to 3 a beam


def order_keys(scores: Tensor) -> Tensor:
    """[m, n] float32 -> int64 that sort as (score, then smaller id): all of a row differ."""
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0 makes −0 equal 0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return (rising << 32) + (0xFFFFFFFF - ids)


def top_logprobs_reference(
    logits: Tensor, k: int, chosen: Tensor | None = None, normalise: bool = True
) -> Top:
    return _found(logits, order_keys(logits).topk(k, -1).indices, chosen, normalise)


def top_logprobs_native(
    logits: Tensor, k: int, chosen: Tensor | None = None, normalise: bool = True
) -> Top:
    """The same on a CPU: keys are made for those rows only where equals straddle the k-th place."""
    if native.enabled and logits.dtype == torch.float32:
        return native.top(logits, k, chosen, normalise)
    values, ids = logits.topk(min(k + 1, logits.shape[1]), -1)
    tied = values[:, k - 1 : k] == values[:, k:]  # [m, 1], or [m, 0] where all or none are wanted
    ids = ids[:, :k]
    if tied.any():
        rows = tied.any(-1)
        ids[rows] = order_keys(logits[rows]).topk(k, -1).indices
    ids = ids.sort(-1).values
    falling = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return _found(logits, ids.gather(1, falling), chosen, normalise)


def _found(logits: Tensor, ids: Tensor, chosen: Tensor | None, normalise: bool) -> Top:
    at = ids[:, :1] if chosen is None else chosen[:, None]
    rank = 1 + (logits > logits.gather(1, at)).sum(-1)
    scores = logits.log_softmax(-1) if normalise else logits
    return scores.gather(1, ids), ids, scores.gather(1, at)[:, 0], rank


def log_softmax(logits: Tensor) -> Tensor:
    """[m, n]"""
    here = native.enabled and logits.device.type == "cpu" and logits.dtype == torch.float32
    return native.log_softmax(logits) if here else logits.log_softmax(-1)


@triton.jit
def _keys(x, id):
    """As `order_keys`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (rising.to(tl.int64) << 32) + (0xFFFFFFFF - id.to(tl.int64))


@triton.jit
def _score(key):
    rising = (key >> 32).to(tl.int32)
    return tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising).to(tl.float32, bitcast=True)


@triton.jit
def _part(logits, chosen, keys, sums, above, size, K: tl.constexpr, BLOCK: tl.constexpr):
    """keys [m, parts, K], sums [m, parts, 2]: the greatest logit and Σ exp of what is below it,
    above [m, parts]: how many beat the chosen id."""
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + id, id < size, other=-float("inf"))
    top = tl.max(x)
    total = tl.sum(tl.where(x == -float("inf"), 0.0, tl.exp(x - top)))
    tl.store(sums + part * 2, top)
    tl.store(sums + part * 2 + 1, total)
    if chosen is not None:
        mine = tl.load(logits + row * size + tl.load(chosen + row))
        tl.store(above + part, tl.sum((x > mine).to(tl.int32)))
    left = tl.where(id < size, _keys(x, id), -(1 << 63))
    for j in range(K):
        best = tl.max(left)
        tl.store(keys + part * K + j, best)
        left = tl.where(left == best, -(1 << 63), left)


@triton.jit
def _merge(
    logits, chosen, keys, sums, above, values, ids, logprob, rank, size, parts,
    NORMALISE: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    shift = 0.0
    if NORMALISE:
        at = sums + (row * parts + part) * 2
        tops = tl.load(at, part < parts, other=-float("inf"))
        top = tl.max(tops)
        scaled = tl.load(at + 1, part < parts, other=0.0) * tl.exp(tops - top)
        shift = top + tl.log(tl.sum(tl.where(tops == -float("inf"), 0.0, scaled)))
    if chosen is not None:
        mine = tl.load(logits + row * size + tl.load(chosen + row))
        tl.store(logprob + row, mine - shift)
        beaten = tl.load(above + row * parts + part, part < parts, other=0)
        tl.store(rank + row, 1 + tl.sum(beaten).to(tl.int64))
    i = tl.arange(0, KEYS)
    left = tl.load(keys + row * parts * K + i, i < parts * K, other=-(1 << 63))
    for j in range(K):
        best = tl.max(left)
        tl.store(values + row * K + j, _score(best) - shift)
        tl.store(ids + row * K + j, 0xFFFFFFFF - (best & 0xFFFFFFFF))
        left = tl.where(left == best, -(1 << 63), left)


def _launch(logits: Tensor, k: int, chosen: Tensor | None = None, normalise: bool = True) -> Top:
    if k > MOST:
        return top_logprobs_reference(logits, k, chosen, normalise)
    logits = logits.contiguous()
    part, merge = (configured(CONFIGS, logits.device, kind) for kind in ("part", "merge"))
    (rows, size), parts = logits.shape, triton.cdiv(logits.shape[1], part.block)
    most = triton.next_power_of_2(k) if k else 0  # few variants, or each k compiles its own
    keys = torch.empty(rows, parts, most, dtype=torch.int64, device=logits.device)
    sums = logits.new_empty(rows, parts, 2)
    above = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    values, logprob = logits.new_empty(rows, most), logits.new_empty(rows)
    ids, rank = keys.new_empty(rows, most), keys.new_empty(rows)
    if rows:
        launch(
            _part, (rows, parts), logits, chosen, keys, sums, above, size,
            K=most, BLOCK=part.block, **runs(part),
        )  # fmt: skip
        launch(
            _merge, (rows,), logits, chosen, keys, sums, above, values, ids, logprob, rank,
            size, parts, NORMALISE=normalise, K=most, PARTS=triton.next_power_of_2(parts),
            KEYS=triton.next_power_of_2(max(1, parts * most)), **runs(merge),
        )  # fmt: skip
    values, ids = values[:, :k], ids[:, :k]
    if chosen is None:
        return values, ids, values[:, 0], torch.ones_like(rank)
    return values, ids, logprob, rank


def _trial(probe: Probe) -> Iterator[Call]:
    # In halves, so that there are equals, and sums are the same in float64.
    logits = (4 * probe.random(3, probe.vocabulary)).float().round() / 2
    chosen = torch.tensor([0, 7, probe.vocabulary - 1], device=probe.device)
    yield Call((logits, 0, chosen, True), {})
    yield Call((logits, 5, chosen, True), {})
    yield Call((logits, 16, None, False), {})


TOP_LOGPROBS = Kernel(
    "top_logprobs", top_logprobs_reference, _launch, _trial, native=top_logprobs_native
)


def top_logprobs(
    logits: Tensor, k: int, chosen: Tensor | None = None, *, normalise: bool = True
) -> Top:
    """logits [m, vocabulary] float32, chosen [m] int64 (None: the best)
    -> values [m, k] falling, ids [m, k] int64, the chosen's log-probability [m] and rank [m] int64

    normalise=False takes `logits` for log-probabilities as they are (beams, after penalties).
    """
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}: a vocabulary of {logits.shape[1]} has 0 to as many best")
    if chosen is None and k == 0:
        raise ValueError("k is 0 and nothing is chosen: there is nothing to find")
    found: Top = TOP_LOGPROBS(logits, k, chosen, normalise)
    return found
