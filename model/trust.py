"""What trial calls must look like to try the kernels as this very network runs them."""

import torch

from kernels.backend import Probe
from model.cache import Cache
from model.config import ModelConfig


def probes(config: ModelConfig, cache: Cache, dtype: torch.dtype) -> list[Probe]:
    """One for each kind of layer: windows and rotations may alternate."""
    kinds = dict.fromkeys((config.window(i), config.rope(i)) for i in range(config.layers))
    return [
        Probe(
            device=cache.pages.device,
            dtype=dtype,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden=config.hidden,
            feed_forward=config.feed_forward,
            vocabulary=config.vocabulary,
            page=cache.page_size,
            page_dtype=cache.pages.dtype,
            window=window,
            softcap=config.attention_softcap,
            sinks=config.sinks,
            slopes=config.positions == "alibi",
            turned=0 if rope is None else rope.dim,
            interleaved=rope is not None and rope.interleaved,
            normed=(config.qk_norm, config.qk_norm_kind) == ("head", "rms"),
        )
        for window, rope in kinds
    ]
