"""Penalties and masks on logits, and the draw of one token a row.

`penalise`, a row with its counts of seen tokens (2 · how often drawn + 1 if in the prompt):
    seen:   x = x / repetition if x > 0 else x · repetition
    drawn:  x = x − frequency · drawn − presence · (drawn > 0)
    masked: x = −inf

`sample`, a row at temperature t > 0, with z = x / t and whole weights w = ⌊2⁴⁰ · exp(z − max z)⌋:
    top-k      keeps z ≥ the k-th greatest z
    top-p      keeps a token while the w of what is greater is < top_p of what was kept so far
    min-p      keeps w ≥ min_p of the greatest w
    typical-p  the same as top-p, nearest first by | −log p − entropy | over what was kept so far
    draws      the first id at which the running sum of kept w exceeds u · Σ w,  u in [0, 1)

Equals are kept or dropped together. Weights are integers so that their sums are exact in any
order: a row's token depends neither on the batch nor on how a device splits the work.
u is `uniform_bits` >> 11 over 2⁵³: output number `position` of the SplitMix64 stream whose state
starts at the branch's key, itself two steps of the same mixing, of seed and branch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UNIT = float(1 << 40)  # the greatest weight: 2²² of them still fit into 63 bits
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


# -- penalise ------------------------------------------------------------------------------------


def penalise_reference(
    logits: Tensor, counts: Tensor, slots: Tensor, penalties: Tensor, masks: Tensor, masked: Tensor
) -> Tensor:
    seen = torch.where(slots[:, None] >= 0, counts[slots.clamp(min=0)], 0)
    repetition, frequency, presence = penalties[:, :, None].unbind(1)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    drawn = seen >> 1
    less = frequency * drawn + presence * (drawn > 0)
    out = torch.where(seen > 0, scaled, logits) - less
    ids = torch.arange(logits.shape[1], device=logits.device)
    words = masks[masked.clamp(min=0)][:, ids >> 5]
    banned = ((words >> (ids & 31)) & 1 == 0) & (masked[:, None] >= 0)
    return out.masked_fill(banned, -torch.inf)


def penalise(
    logits: Tensor, counts: Tensor, slots: Tensor, penalties: Tensor, masks: Tensor, masked: Tensor
) -> Tensor:
    """logits [m, vocabulary] f32, counts [slots, vocabulary] i32, slots [m] i64 (−1: none),
    penalties [m, 3] f32 (repetition, frequency, presence), masks [slots, ⌈vocabulary / 32⌉] i32
    (bit 1: allowed), masked [m] i64 (−1: no mask) -> [m, vocabulary]"""
    if counts.shape[1] != logits.shape[1] or masks.shape[1] != -(-logits.shape[1] // 32):
        raise ValueError(
            f"counts of {counts.shape[1]} and masks of {masks.shape[1]} words"
            f" are not for {logits.shape[1]} logits"
        )
    return penalise_reference(logits, counts, slots, penalties, masks, masked)


# -- sample --------------------------------------------------------------------------------------


def sample_reference(logits: Tensor, bits: Tensor, settings: Tensor) -> Tensor:
    greedy = settings[:, TEMPERATURE] == 0
    weights = kept_weights(logits, settings, logits.shape[1])
    tokens = torch.where(greedy, logits.argmax(-1), _draw(weights, bits))
    return tokens.masked_fill(~logits.amax(-1).isfinite(), -1)


def kept_weights(logits: Tensor, settings: Tensor, width: int) -> Tensor:
    """-> [m, vocabulary] int64, 0 where a token is not kept. `width`: how many best to sort first;
    the vocabulary's size sorts once and never asks the device whether that was enough."""
    temperature, top_k, top_p, min_p, typical_p = settings[:, :, None].unbind(1)
    scores = logits / torch.where(temperature > 0, temperature, 1)
    scores -= scores.amax(-1, keepdim=True)
    weights = scores.exp().mul_(UNIT).long()
    if _wanted(top_k > 0):
        best = scores.topk(_widest(top_k, logits.shape[1]), -1).values
        last = best.gather(1, (top_k.long() - 1).clamp(0, best.shape[1] - 1))
        weights.masked_fill_((scores < last) & (top_k > 0), 0)
    if _wanted(top_p < 1):
        weights.masked_fill_((scores < _mass_cut(scores, weights, top_p, width)) & (top_p < 1), 0)
    if _wanted(min_p > 0):
        weights.masked_fill_(weights < min_p.double() * UNIT, 0)
    if _wanted(typical_p < 1):
        near = _nearness(weights)
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


def _nearness(weights: Tensor) -> Tensor:
    """−| −log p − entropy | of what is kept, [m, vocabulary]; −inf of what is not."""
    p = weights.double() / weights.sum(-1, keepdim=True)
    surprise = -p.log()
    entropy = (p * surprise).nansum(-1, keepdim=True)
    return -(surprise - entropy).abs().float()


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
    if logits.device.type == "cpu":
        return sample_native(logits, bits, settings)
    return sample_reference(logits, bits, settings)
