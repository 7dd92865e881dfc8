"""Where a token stands: tables of rotations and of waves, and the slopes of ALiBi."""

import math

import torch
from torch import Tensor

from model.config import Rope


def inverse_frequencies(rope: Rope, context: int) -> Tensor:
    """[dim / 2] radians a position. What grows with the text in the papers (dynamic, longrope)
    is fixed here by the context served, so that keys in pages stay valid while a text grows."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain: Tensor = 1.0 / rope.theta**exponents
    trained = rope.trained_context or context
    match rope.scaling:
        case "none":
            return plain
        case "linear":
            return plain / rope.factor
        case "dynamic":
            reach = max(context, trained)
            stretch = rope.factor * reach / trained - (rope.factor - 1)
            theta = stretch ** (rope.dim / (rope.dim - 2)) * rope.theta
            return plain * (rope.theta / theta) ** exponents
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain)
        case "longrope":
            factors = rope.long_factors if context > trained else rope.short_factors
            return plain / torch.tensor(factors)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long waves divided by the factor, short ones kept, a straight blend between."""
    turns = rope.trained_context * plain / (2 * math.pi)
    kept = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    kept = kept.clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """Channels that turn often are kept, those that turn seldom divided, a ramp between."""

    def channel(turns: float) -> float:
        log = math.log(rope.trained_context / (turns * 2 * math.pi))
        return rope.dim * log / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2) - low) / max(high - low, 0.001)
    divided = ramp.clamp(0, 1)
    return plain / rope.factor * divided + plain * (1 - divided)


def rope_table(rope: Rope, context: int) -> Tensor:
    """[context, dim]: cosines, then sines, of every position."""
    angles = torch.arange(context).float()[:, None] * inverse_frequencies(rope, context)
    return torch.cat((angles.cos(), angles.sin()), -1) * rope.attention_factor


def sinusoid_table(positions: int, width: int, interleaved: bool) -> Tensor:
    """[positions, width]: sine and cosine side by side (Vaswani et al.), or all sines and then
    all cosines with a slightly different wavelength (tensor2tensor, fairseq)."""
    half = width // 2
    steps = torch.arange(half).float() / (half if interleaved else half - 1)
    angles = torch.arange(positions).float()[:, None] * torch.exp(-math.log(10_000) * steps)
    pair = (angles.sin(), angles.cos())
    return torch.stack(pair, -1).flatten(1) if interleaved else torch.cat(pair, -1)


def alibi_slopes(heads: int) -> Tensor:
    """[heads], a geometric row from 2^(−8/n); heads beyond a power of two fill in between."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes)
