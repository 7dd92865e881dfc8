"""What a family of checkpoints is: a reading of its config.json, and a place for each tensor.

Names are patterns: {i} is a layer, {e} an expert or a head, * is weight or bias. A target is our
parameter's name, then words that say which part of it the tensor fills (q k v gate up; {e} when
it is one of many) and what is done to it on the way (see `CHANGES`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.readings import common

Json = dict[str, Any]
Change = Callable[[Tensor, ModelConfig], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor goes."""

    name: str  # our parameter
    index: int | None = None  # of the expert or head, in dim 0
    rows: slice | None = None  # the part it fills, in the dim after that
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Family:
    config: Callable[[Json], dict[str, Any]]
    names: Mapping[str, str]
    skip: tuple[str, ...] = ()  # buffers that old checkpoints carry along

    def read(self, name: str, h: Json) -> ModelConfig:
        return ModelConfig(family=name, **common(h) | self.config(h))

    def place(self, name: str, config: ModelConfig) -> Place | None:
        """None: a known buffer that is not a weight. An unknown name raises KeyError."""
        for pattern, target in self.patterns:
            if match := pattern.fullmatch(name):
                return _place(target, match.groupdict(), config)
        if any(re.fullmatch(skip, name) for skip in self.skip):
            return None
        raise KeyError(name)

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(source), target) for source, target in self.names.items()]


def _pattern(source: str) -> re.Pattern[str]:
    escaped = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(escaped.replace(r"\*", "(?P<s>weight|bias)"))


def _place(target: str, found: Mapping[str, str], config: ModelConfig) -> Place:
    name, *words = target.split()
    name = name.replace("{i}", found.get("i", "")).replace("*", found.get("s", ""))
    index = int(found["e"]) if "{e}" in words else None
    rows = next((part for word in words if (part := _rows(word, name, config))), None)
    changes = [CHANGES[word] for word in words if word in CHANGES]

    def change(tensor: Tensor) -> Tensor:
        for one in changes:
            tensor = one(tensor, config)
        return tensor

    return Place(name, index, rows, change if changes else None)


def _rows(word: str, name: str, config: ModelConfig) -> slice | None:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    width = config.feed_forward
    if config.experts and config.has_experts(int(name.split(".")[1]) if ".mlp." in name else 0):
        shared = ".shared." in name
        width = config.experts.shared_feed_forward if shared else config.experts.feed_forward
    return {
        "q": slice(0, q),
        "k": slice(q, q + kv),
        "v": slice(q + kv, q + 2 * kv),
        "gate": slice(0, width),
        "up": slice(width, 2 * width),
    }.get(word)


# ── what is done to a tensor on its way ───────────────────────────────────────────────────────


def _heads_apart(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Fused [groups · (queries… key value) · dim, …] -> all queries, all keys, all values."""
    group = config.heads // config.kv_heads
    parts = tensor.view(config.kv_heads, group + 2, config.head_dim, *tensor.shape[1:])
    query, key, value = parts.split((group, 1, 1), 1)
    return torch.cat([part.flatten(0, 2) for part in (query, key, value)])


def _transposed(tensor: Tensor, _config: ModelConfig) -> Tensor:
    return tensor.transpose(-1, -2)


def _gate_first(tensor: Tensor, _config: ModelConfig) -> Tensor:
    """gate, up, gate, up, … along dim 1 -> all gates, all ups."""
    return torch.cat((tensor[:, 0::2], tensor[:, 1::2]), 1)


def _plus_one(tensor: Tensor, _config: ModelConfig) -> Tensor:
    return tensor.float() + 1


CHANGES: dict[str, Change] = {
    "heads-apart": _heads_apart,
    "transposed": _transposed,
    "gate-first": _gate_first,
    "plus-one": _plus_one,
}
