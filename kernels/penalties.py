"""Penalties and masks: what a row's past, and what it may say at all, do to its logits.

A row has the counts of the tokens that it saw: 2 · how often drawn, + 1 if in the prompt.

    seen:   x = x / repetition if x > 0 else x · repetition
    drawn:  x = x − frequency · drawn − presence · (drawn > 0)
    masked: x = −inf
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.backend import Call, Kernel, Probe, launch, tl, triton
from kernels.config import Config, Key, configured, runs

Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _less(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """[..., n] after penalties [..., 3]"""
    repetition, frequency, presence = penalties[..., None].unbind(-2)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    drawn = seen >> 1
    return torch.where(seen > 0, scaled, logits) - (frequency * drawn + presence * (drawn > 0))


def penalise_reference(
    logits: Tensor, counts: Tensor, slots: Tensor, penalties: Tensor, masks: Tensor, masked: Tensor
) -> Tensor:
    seen = torch.where(slots[:, None] >= 0, counts[slots.clamp(min=0)], 0)
    out = torch.where(slots[:, None] >= 0, _less(logits, seen, penalties), logits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    words = masks[masked.clamp(min=0)][:, ids >> 5]
    banned = ((words >> (ids & 31)) & 1 == 0) & (masked[:, None] >= 0)
    return out.masked_fill(banned, -torch.inf)


@triton.jit
def _penalise(
    logits, counts, slots, penalties, masks, masked, y, size, words, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = id < size
    x = tl.load(logits + row * size + id, inside, other=0.0)
    slot = tl.load(slots + row)
    if slot >= 0:
        seen = tl.load(counts + slot * size + id, inside, other=0)
        repetition = tl.load(penalties + row * 3)
        scaled = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        drawn = (seen >> 1).to(tl.float32)
        less = tl.load(penalties + row * 3 + 1) * drawn
        less += tl.where(drawn > 0, tl.load(penalties + row * 3 + 2), 0.0)
        x = tl.where(seen > 0, scaled, x) - less
    mask = tl.load(masked + row)
    if mask >= 0:
        word = tl.load(masks + mask * words + (id >> 5), inside, other=0)
        x = tl.where((word >> (id & 31)) & 1 == 0, -float("inf"), x)
    tl.store(y + row * size + id, x, inside)


CONFIGS: dict[Key, Config] = {("penalise",): Config(1024, 4)}  # logits a program


def _launch(
    logits: Tensor, counts: Tensor, slots: Tensor, penalties: Tensor, masks: Tensor, masked: Tensor
) -> Tensor:
    logits, y = logits.contiguous(), torch.empty_like(logits)
    rows, size = logits.shape
    if rows:
        config = configured(CONFIGS, logits.device, "penalise")
        launch(
            _penalise, (rows, triton.cdiv(size, config.block)), logits, counts, slots, penalties,
            masks, masked, y, size, masks.shape[1], BLOCK=config.block, **runs(config),
        )  # fmt: skip
    return y


def penalise_native(
    logits: Tensor, counts: Tensor, slots: Tensor, penalties: Tensor, masks: Tensor, masked: Tensor
) -> Tensor:
    """The same on a CPU, where only the tokens that were seen are touched."""
    y = logits.clone()
    for row, (slot, mask) in enumerate(zip(slots.tolist(), masked.tolist())):
        if slot >= 0:
            ids = counts[slot].nonzero()[:, 0]
            y[row, ids] = _less(y[row, ids], counts[slot, ids], penalties[row])
        if mask >= 0:
            words = masks[mask].numpy().view(np.uint8)
            bits = np.unpackbits(words, count=logits.shape[1], bitorder="little")
            y[row].masked_fill_(torch.from_numpy(bits == 0), -torch.inf)
    return y


def _trial(probe: Probe) -> Iterator[Call]:
    size, logits = probe.vocabulary, probe.random(3, probe.vocabulary).float()
    counts = (probe.random(2, size, seed=1).float() * 2).int().clamp(min=0)
    masks = (probe.random(2, -(-size // 32), seed=2).float() * 1e9).int()
    slots, masked = torch.tensor([[1, -1, 0], [-1, 1, 0]], device=probe.device)
    penalties = torch.tensor([[1.3, 0.5, -0.25]] * 3, device=probe.device)
    yield Call((logits, counts, slots, penalties, masks, masked), {})


PENALISE = Kernel("penalise", penalise_reference, _launch, _trial, native=penalise_native)


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
    found: Tensor = PENALISE(logits, counts, slots, penalties, masks, masked)
    return found
