"""How a kernel's work is cut up and run: its file's one table, chosen from by what is launched.

A file's `CONFIGS` has a line for each key that matters there: what runs, a width, the bytes of a
number. The same key behind an architecture, (90, "gate"), is that architecture's own line. Lines
are chosen for no spills in the ahead-of-time compile (`python -m benchmarks.kernels --list` shows
them), and by time where the comment says so. Nothing is tried out while serving: it would
compile in front of a request, and sums would depend on the machine's mood.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch

from kernels.backend import describe

Key = tuple[int | str, ...]


class Config(NamedTuple):
    """A line, where nothing else is to be chosen."""

    block: int  # what a program takes at once; the table says of what
    warps: int
    stages: int = 1  # loads under way, where there is a loop of them


class Line(Protocol):
    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...


Chosen = TypeVar("Chosen", bound=Line)


def configured(configs: Mapping[Key, Chosen], where: torch.device, *key: int | str) -> Chosen:
    """The line of this key, or the architecture's own."""
    return configs.get((describe(where).arch, *key)) or configs[key]


def runs(config: Line) -> dict[str, int]:
    """How it runs, as a launch takes it: every launch says so."""
    return {"num_warps": config.warps, "num_stages": config.stages}
