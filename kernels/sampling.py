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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.backend import Call, Kernel, Probe
from kernels.sampling_triton import launch_sample

UNIT = 2.0**40  # the greatest weight: 2²² of them still fit into 63 bits
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64: Steele, Lea, Flood 2014
CANDIDATES = 256  # how many best are first looked at on a CPU; most cuts lie within
CHUNK = 1 << 20  # logits at once on a CPU, so that they stay in its cache

TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P = range(5)  # columns of settings


# -- randomness, on the host: one number a row ----------------------------------------------------


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def branch_key(seed: int, branch: int) -> int:
    """Where the stream of a branch starts; any integer is a seed, taken modulo 2⁶⁴."""
    state = np.array([seed % (1 << 64)], np.uint64)
    for step in (1, branch + 1):
        state = _mix(state + np.uint64(step * GOLDEN % (1 << 64)))
    return int(state[0])


def uniform_bits(
    keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """keys, positions [m] -> 64 random bits [m]"""
    state = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    return _mix(state).view(np.int64)


# -- the draw ------------------------------------------------------------------------------------


def sample_reference(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    greedy = settings[:, TEMPERATURE] == 0
    weights = kept_weights(logits, settings, logits.shape[1])
    tokens = torch.where(greedy, logits.argmax(-1), _draw(weights, bits))
    return tokens.masked_fill(~logits.amax(-1).isfinite(), -1)


def kept_weights(logits: Tensor, settings: Tensor, width: int) -> Tensor:
    """-> [m, vocabulary] int64, 0 where a token is not kept. `width`: how many best to sort first;
    the vocabulary's size sorts once and never asks the device whether that was enough."""
    temperature, top_k, top_p, min_p, typical_p = settings[:, :, None].unbind(1)
    below = (logits - logits.amax(-1, keepdim=True)) * (1 / temperature.where(temperature > 0, 1))
    weights = (below.exp() * UNIT).long()
    if _wanted(top_k > 0):
        best = logits.topk(_widest(top_k, logits.shape[1]), -1).values
        last = best.gather(1, (top_k.long() - 1).clamp(0, best.shape[1] - 1))
        weights.masked_fill_((logits < last) & (top_k > 0), 0)
    if _wanted(top_p < 1):
        weights.masked_fill_((logits < _mass_cut(logits, weights, top_p, width)) & (top_p < 1), 0)
    if _wanted(min_p > 0):
        weights.masked_fill_(weights < min_p.double() * UNIT, 0)
    if _wanted(typical_p < 1):
        near = _nearness(below, weights)
        cut = _mass_cut(near, weights, typical_p, width)
        weights.masked_fill_((near < cut) & (typical_p < 1), 0)
    return weights


def _wanted(rows: Tensor) -> bool:
    """Whether a filter must run. Off the CPU it always does: to ask would be to wait."""
    return rows.device.type != "cpu" or bool(rows.any())


def _widest(top_k: Tensor, size: int) -> int:
    return size if top_k.device.type != "cpu" else min(int(top_k.max()), size)


def _mass_cut(scores: Tensor, weights: Tensor, share: Tensor, width: int) -> Tensor:
    """The lowest score kept when the greatest are taken until they hold `share` of all weight."""
    target = share.double() * weights.sum(-1, keepdim=True)
    size = scores.shape[1]
    while True:
        width = min(width, size)
        best = scores.topk(width, -1)
        held = weights.gather(1, best.indices)
        count = (held.cumsum(-1) - held < target).sum(-1, keepdim=True)
        if width == size or bool((count < width).all()):
            return best.values.gather(1, (count - 1).clamp(min=0))
        width *= 16


def _nearness(below: Tensor, weights: Tensor) -> Tensor:
    """−| −log p − entropy | of what is kept, [m, vocabulary]; −inf of what is not. Both are
    log Σ w apart from `below` and its mean, and what they share does not matter."""
    held = (weights * below.double()).masked_fill(weights == 0, 0)
    mean = held.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return (-(below - mean.float()).abs()).masked_fill(weights == 0, -torch.inf)


def _draw(weights: Tensor, bits: Tensor) -> Tensor:
    """The first id whose running sum exceeds u · total, [m]"""
    sums = weights.cumsum(-1)
    share = ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    total = sums[:, -1]
    at = torch.minimum((share * total).long(), total - 1)
    tokens = torch.searchsorted(sums, at[:, None], right=True)[:, 0]
    return tokens.clamp(max=weights.shape[1] - 1)


def sample_native(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    """The CPU's own way: some rows at a time, only the best sorted, only filters that are on."""
    tokens = torch.empty(len(logits), dtype=torch.int64)
    greedy = settings[:, TEMPERATURE] == 0
    plain = ~greedy & (settings[:, TOP_K:] == settings.new_tensor([0, 1, 0, 1])).all(-1)
    for rows in (greedy, plain, ~(greedy | plain)):
        for some in torch.split(rows.nonzero()[:, 0], max(1, CHUNK // logits.shape[1])):
            mine = logits[some]
            if rows is greedy:
                tokens[some] = mine.argmax(-1)
            else:
                weights = kept_weights(mine, settings[some], CANDIDATES)
                tokens[some] = _draw(weights, bits[some])
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
