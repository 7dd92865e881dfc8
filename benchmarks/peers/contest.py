"""Engines that take turns, and the least time that the machine allows for their work."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.limits import Limits, Memory
from benchmarks.peers import Work
from benchmarks.peers.remote import Failed, Remote
from benchmarks.peers.source import weights

WITHOUT_FIRST = "decode"  # the case that counts what comes after the first token
HEAD = {
    "float32": 4.0,
    "F32": 4.0,
    "BF16": 2.0,
    "int8": 1.0,
    "int4": 1.0,
    "Q8_0": 34 / 32,
    "Q4_0": 34 / 32,
}
BYTES = HEAD | {"int4": 0.5 + 4 / 128, "Q4_0": 18 / 32}  # of a weight in the layers


class Turn(NamedTuple):
    wall: float  # seconds
    cpu: float
    read: float  # bytes/s that the memory gave just before and after


@dataclass(eq=False)
class Seat:
    """An engine's place in the contest, and what it has shown."""

    engine: str
    form: str
    folder: Path
    threads: int
    vocabulary: int
    taken: dict[str, list[Turn]] = field(default_factory=dict)  # of each case
    why: dict[str, str] = field(default_factory=dict)  # case: the reason that it has no number
    remote: Remote | None = None
    peak: int = 0

    @property
    def name(self) -> str:
        plain = self.form in ("float32", "int8", "int4", "F32")
        return self.engine if plain else f"{self.engine} {self.form}"

    def turn(self, case: str, work: Work, counts: bool, patience: float, memory: Memory) -> None:
        if case in self.why:
            return
        reads: list[float] = []
        try:
            with memory.beside(reads):
                wall, cpu = self._ask(work, patience)
            if case == WITHOUT_FIRST:
                first, first_cpu = self._ask(replace(work, new=1), patience)
                wall, cpu = wall - first, cpu - first_cpu
        except Failed as reason:
            self.why[case] = str(reason)
            return
        if counts:
            self.taken.setdefault(case, []).append(Turn(wall, cpu, *reads))

    def _ask(self, work: Work, patience: float) -> tuple[float, float]:
        if self.remote is None or not self.remote.alive:
            self.remote = Remote(self.engine, self.form, self.folder, self.threads, self.vocabulary)
        answer = self.remote.ask(work, patience)
        self.peak = max(self.peak, self.remote.peak)
        return answer["wall"], answer["cpu"]

    def leave(self) -> None:
        if self.remote is not None:
            self.remote.close()


def contest(
    rivals: list[Seat],
    cases: Mapping[str, Work],
    rounds: int,
    stay: bool,
    patience: float,
    memory: Memory,
) -> None:
    """Everyone once a round, beginning with another each time; if not all can `stay` in memory at
    once, each does all cases in a row and leaves."""
    with tqdm(total=(rounds + 1) * len(cases) * len(rivals), disable=None) as bar:
        for number in range(rounds + 1):
            order = rivals[number % len(rivals) :] + rivals[: number % len(rivals)]
            turns = list(itertools.product(cases, order))
            if not stay:
                turns.sort(key=lambda turn: order.index(turn[1]))
            for case, seat in turns:
                bar.set_description(f"{seat.name}: {case}")
                work = replace(cases[case], seed=number)
                warm = replace(work, new=min(work.new, 8))
                seat.turn(case, work if number else warm, number > 0, patience, memory)
                bar.update()
                if not stay and case == list(cases)[-1]:
                    seat.leave()
    for seat in rivals:
        seat.leave()


def least(work: Work, engine: str, form: str, shape: dict[str, Any], ceiling: Limits) -> float:
    """Seconds that reading the weights, keys and values, or the products take at the least."""
    layers, head = weights(shape), shape["vocabulary"] * shape["hidden"]
    floats = form in ("float32", "F32", "BF16")
    rate = ceiling.float32 if floats else ceiling.int8 or ceiling.float32
    stays = engine.startswith("kvist") and form == "float32" and shape["stored"] == "bfloat16"
    kept = "BF16" if stays else form  # float32's numbers, in half of the bytes
    read = (BYTES[kept] * layers + HEAD[kept] * head) / ceiling.read
    seen = work.prompt + work.new / 2
    width = shape["hidden"] // shape["heads"] * shape["kv_heads"]
    number = 4 if form in ("float32", "F32") else 2  # bytes; some keep less: little of a step
    pages = number * 2 * shape["layers"] * width * seen / ceiling.read  # of one row
    rows = work.streams * work.beams
    prompt = max(read, 2 * work.streams * (layers * work.prompt + head) / rate)
    step = max(read + rows * pages, 2 * rows * (layers + head) / rate)
    return prompt + (work.new - 1) * step
