"""The draw of one token a row, under every parameter, without a sort.

A row at temperature t > 0, with z = (x − max x) / t and whole weights w = ⌊2⁴⁰ · exp z⌋:
    top-k      keeps x ≥ the k-th greatest x
    top-p      keeps a token while the w of what is greater is < top_p of what was kept so far
    min-p      keeps w ≥ min_p of the greatest w
    typical-p  the same as top-p, nearest first by | −log p − entropy | over what was kept so far
    draws      the first id at which the running sum of kept w exceeds u · Σ w,  u in [0, 1)

Equals are kept or dropped together. Weights are integers so that their sums are exact in any
order: a row's token depends neither on the batch nor on how a device splits the work.
u is `uniform_bits` >> 11 over 2⁵³: output number `position` of the SplitMix64 stream whose state
starts at the branch's key, itself two steps of the same mixing, of seed and branch.

Only the twin sorts the vocabulary: a CPU looks at some best first, and at more if they do not
hold enough; `sampling_triton.py` closes in on the lowest score kept.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import native
from kernels.backend import Call, Kernel, Probe
from kernels.sampling_triton import launch_sample

UNIT = 2.0**40  # the greatest weight: 2²² of them still fit into 63 bits
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64: Steele, Lea, Flood 2014
CANDIDATES = 256  # how many best are first looked at on a CPU; most cuts lie within
CHUNK = 1 << 20  # logits at once on a CPU, so that they stay in its cache

ONES = (1 << 64) - 1
Word = TypeVar("Word", int, npt.NDArray[Any])  # of 64 bits, one or many

OFF = (0, 1, 0, 1)  # top_k, top_p, min_p, typical_p that change nothing


# -- randomness, on the host: one number a row ----------------------------------------------------


def _mix(x: Word) -> Word:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ONES
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ONES
    return x ^ (x >> 31)


def branch_key(seed: int, branch: int) -> int:
    """Where the stream of a branch starts; any integer is a seed, taken modulo 2⁶⁴."""
    state = seed
    for step in (1, branch + 1):
        state = _mix(state + step * GOLDEN & ONES)
    return state


def uniform_bits(
    keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """keys, positions [m] -> 64 random bits [m]"""
    state = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    return _mix(state).view(np.int64)


# -- the draw ------------------------------------------------------------------------------------


def sample_reference(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    ids, weights = keep(logits, settings, logits.shape[1])
    tokens = torch.where(settings[:, 0] > 0, _draw_best(ids, weights, bits), logits.argmax(-1))
    return tokens.masked_fill(~logits.amax(-1).isfinite(), -1)


def keep(logits: Tensor, settings: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """-> ids [m, n] of the best, falling, and their weights, 0 if dropped. n is `width` if that
    holds all that is kept, else more; the vocabulary's size always does, and asks nobody."""
    temperature, top_k, top_p, min_p, typical_p = settings[:, :, None].unbind(1)
    inverse = 1 / temperature.where(temperature > 0, 1)
    size = logits.shape[1]
    everything = _all_weights(logits, inverse, (top_k == 0) & (top_p < 1))
    while True:
        width = min(width, size)
        values, ids = logits.topk(width, -1)
        weights = _weigh(values, values[:, :1], inverse)
        last = values.gather(1, (top_k.long() - 1).clamp(0, width - 1))
        weights.masked_fill_((values < last) & (top_k > 0), 0)
        of = torch.where(top_k > 0, weights.sum(-1, keepdim=True), everything)
        weights.masked_fill_((values < _mass_cut(values, weights, top_p, of)) & (top_p < 1), 0)
        weights.masked_fill_(weights < min_p.double() * UNIT, 0)
        if width == size or not weights[:, -1].any():
            break
        width = 16 * width
    if _unwanted(typical_p < 1):
        return ids, weights
    near = _nearness((values - values[:, :1]) * inverse, weights)
    order = near.sort(-1, descending=True).indices
    near, ids, weights = (t.gather(1, order) for t in (near, ids, weights))
    cut = _mass_cut(near, weights, typical_p, weights.sum(-1, keepdim=True))
    return ids, weights.masked_fill_((near < cut) & (typical_p < 1), 0)


def _weigh(logits: Tensor, top: Tensor, inverse: Tensor) -> Tensor:
    return ((logits - top) * inverse).exp_().mul_(UNIT).long()


def _all_weights(logits: Tensor, inverse: Tensor, wanted: Tensor) -> Tensor:
    """Σ w over the whole vocabulary, [m, 1], where anyone wants it."""
    if _unwanted(wanted):
        return torch.zeros(1, dtype=torch.int64)
    return _weigh(logits, logits.amax(-1, keepdim=True), inverse).sum(-1, keepdim=True)


def _unwanted(wanted: Tensor) -> bool:
    """Whether nobody wants it. Elsewhere than on a CPU to ask would be to wait: someone may."""
    return wanted.device.type == "cpu" and not wanted.any()


def _mass_cut(scores: Tensor, weights: Tensor, share: Tensor, total: Tensor) -> Tensor:
    """The lowest of falling scores kept when the first are taken until they hold their share."""
    count = (weights.cumsum(-1) - weights < share.double() * total).sum(-1, keepdim=True)
    return scores.gather(1, (count - 1).clamp(min=0))


def _nearness(below: Tensor, weights: Tensor) -> Tensor:
    """−| −log p − entropy | of what is kept, [m, n]; −inf of what is not. Both are log Σ w apart
    from `below` and its mean, and what they share does not matter."""
    held = (weights * below.double()).masked_fill(weights == 0, 0)
    mean = held.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return (-(below - mean.float()).abs()).masked_fill(weights == 0, -torch.inf)


def _draw(weights: Tensor, bits: Tensor) -> Tensor:
    """The first place whose running sum exceeds u · total, [m]"""
    sums = weights.cumsum(-1)
    share = ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    total = sums[:, -1]
    at = torch.minimum((share * total).long(), total - 1)
    places = torch.searchsorted(sums, at[:, None], right=True)[:, 0]
    return places.clamp(max=weights.shape[1] - 1)


def _draw_best(ids: Tensor, weights: Tensor, bits: Tensor) -> Tensor:
    """The same from ids in any order: sums run by id."""
    rising = ids.sort(-1)
    places = _draw(weights.gather(1, rising.indices), bits)
    return rising.values.gather(1, places[:, None])[:, 0]


def sample_native(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    """The CPU's own way: rows of a kind together, some at a time, none sorted but for its best."""
    host = settings.numpy()
    if native.enabled and not host[:, 0].any():
        return native.best(logits, torch.arange(len(logits)))
    tokens = torch.empty(len(logits), dtype=torch.int64)
    kinds = np.where((host[:, 1:] == OFF).all(1), 1, 2) * (host[:, 0] > 0)
    step = max(1, CHUNK // logits.shape[1])
    whole = (native.best, native.draw) if native.enabled else ()
    for kind in np.unique(kinds):
        rows = torch.from_numpy(np.flatnonzero(kinds == kind))
        if kind < len(whole):
            tokens[rows] = whole[kind](logits, rows, bits, settings[:, 0])
            continue
        for some in torch.split(rows, step):
            way = (_greedy, _plain, _filtered)[kind]
            tokens[some] = way(logits[some], bits[some], settings[some])
    return tokens


def _greedy(logits: Tensor, _bits: Tensor, _settings: Tensor) -> Tensor:
    tokens = logits.argmax(-1)
    return tokens.masked_fill_(~logits.gather(1, tokens[:, None])[:, 0].isfinite(), -1)


def _plain(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    top = logits.amax(-1, keepdim=True)
    tokens = _draw(_weigh(logits, top, 1 / settings[:, :1]), bits)
    return tokens.masked_fill_(~top[:, 0].isfinite(), -1)


def _filtered(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    width = max(CANDIDATES, int(settings[:, 1].max()) + 1)  # more than k, or equals could be cut
    tokens = _draw_best(*keep(logits, settings, width), bits)
    return tokens.masked_fill_(~logits.amax(-1).isfinite(), -1)


def _trial(probe: Probe) -> Iterator[Call]:
    settings: list[tuple[float, ...]] = [(0, 0, 1, 0, 1), (1, 0, 1, 0, 1), (0.7, 9, 1, 0, 1)]
    settings += [(1.3, 0, 0.8, 0, 1)]
    settings += [(1, 0, 1, 0.1, 1), (1, 0, 1, 0, 0.7), (0.9, 50, 0.9, 0.01, 0.9)]
    logits = probe.random(len(settings), probe.vocabulary).float() * 3
    bits = torch.arange(len(settings), device=probe.device) * 0x1234_5678_9ABC_DEF1
    yield Call((logits, bits, torch.tensor(settings, device=probe.device)), {})


SAMPLE = Kernel("sample", sample_reference, launch_sample, _trial, native=sample_native)


def sample(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    """logits [m, vocabulary] f32, bits [m] i64 from `uniform_bits`, settings [m, 5] f32
    (temperature, top_k, top_p, min_p, typical_p; temperature 0 is greedy, 0 or 1 switch the others
    off) -> ids [m] i64; −1 where nothing can be drawn: no logit is finite, or one is not a number
    """
    if settings.shape != (len(logits), 5) or bits.shape != (len(logits),):
        raise ValueError(
            f"{len(logits)} rows want settings of [{len(logits)}, 5] and as many bits,"
            f" and got {list(settings.shape)} and {list(bits.shape)}"
        )
    found: Tensor = SAMPLE(logits, bits, settings)
    return found
