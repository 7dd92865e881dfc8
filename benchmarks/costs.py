"""What a network must read and multiply, and the least time that this machine allows for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.limits import Limits
from model.cache import Cache
from model.quantize import FORMATS

if TYPE_CHECKING:
    from server import Engine

ROOM = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a weight


@dataclass(frozen=True)
class Costs:
    layers: int  # weights that every token is multiplied by
    head: int  # weights that a token is multiplied by when its successor is asked for
    width: float  # bytes of a weight
    kept: int  # bytes of a token's keys and values
    kind: str = "float32"  # of the products

    @classmethod
    def of(cls, engine: Engine) -> Costs:
        config, about = engine.parts.ready.config, engine.info
        form = FORMATS.get(about["quantize"])
        head = config.vocabulary * config.hidden
        pages = engine.parts.ready.runner.cache.pages.dtype
        return cls(
            layers=about["parameters"] - head * (1 if config.tied else 2),
            head=head,
            width=form.bits / 8 if form else ROOM[about["weights"]],
            kept=Cache.page_bytes(config, 1, pages),
            kind=about["quantize"] if form else about["dtype"],
        )

    def read(self, rows: int, seen: float) -> float:
        """Bytes of a step, each row with `seen` tokens behind it."""
        return self.width * (self.layers + self.head) + rows * seen * self.kept

    def work(self, rows: int, tokens: int) -> float:
        """Operations of a step in which each row computes so many tokens, and samples one."""
        return 2.0 * rows * (self.layers * tokens + self.head)

    def step(self, ceiling: Limits, rows: int, tokens: int, seen: float) -> float:
        """Seconds at the least."""
        moved = self.read(rows, seen) / ceiling.read
        return max(moved, self.work(rows, tokens) / self.rate(ceiling))

    def whole(self, ceiling: Limits, rows: int, prompt: int, new: int) -> float:
        """Seconds of rows that begin and end together."""
        first = self.step(ceiling, rows, prompt, 0)
        return first + (new - 1) * self.step(ceiling, rows, 1, prompt + new / 2)

    def rate(self, ceiling: Limits) -> float:
        """Operations a second; formats that are unpacked are multiplied as floats."""
        found: float | None = getattr(ceiling, self.kind, None)
        return found or ceiling.float32
