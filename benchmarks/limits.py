"""What this machine can do: the ceilings that every other benchmark is held against.

    python -m benchmarks.limits

Memory read bandwidth, matrix rates by number format, and what a launch or an empty step costs.
Rates are the best that was seen; the bandwidth is the middle of what was, since neighbours take
and leave half of it from second to second: a moment's luck is nothing that a step could have had.
What is held against it reads it beside each turn (`Memory`).
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Self

import torch
from torch import Tensor

from benchmarks import harness

SIDE = 2048  # of the matrices
BYTES = 1 << 30  # read for the bandwidth, far beyond any cache
READS = 3  # a reading is the middle of so many


@dataclass(frozen=True)
class Limits:
    read: float  # bytes/s
    float32: float  # operations/s
    bfloat16: float
    int8: float | None
    launch: float  # seconds of a kernel that does nothing


def measure(rounds: int = 5, threads: int = 0) -> Limits:
    """Some seconds. `threads` of a CPU, if others are to be told than torch has: an engine with
    threads of its own leaves it one."""
    if threads:
        torch.set_num_threads(threads)
    device = _device()
    big = torch.ones(BYTES // 8, dtype=torch.int64, device=device)
    one = torch.ones(1, device=device)
    rivals: dict[str, Callable[[], object]] = {
        "read": big.sum,
        "float32": _product(device, torch.float32),
        "bfloat16": _product(device, torch.bfloat16),
        "launch": lambda: [one.add_(1) for _ in range(1000)],
    }
    if device.type == "cpu":
        rivals["int8"] = _integer_product()
    times = harness.take_turns(rivals, rounds, shown="limits")
    best = {name: min(time.wall) for name, time in times.items()}
    work = 2 * SIDE**3
    return Limits(
        read=BYTES / times["read"].median,
        float32=work / best["float32"],
        bfloat16=work / best["bfloat16"],
        int8=work / best["int8"] if "int8" in best else None,
        launch=best["launch"] / 1000,
    )


class Memory:
    """What the memory gives at a moment. Read in a process of its own, which stays, so that its
    gigabyte is not taken for the memory of what is measured."""

    def __init__(self, threads: int) -> None:
        self.taken: list[float] = []  # bytes/s, of each turn
        self._line, self._end = Pipe()
        self._reader = get_context("spawn").Process(target=_serve, args=(self._end, threads))

    def __enter__(self) -> Self:
        self._reader.start()
        self._end.close()  # the reader's: it ends when nobody is left who could ask
        self._read()  # warm
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._reader.join()

    @contextmanager
    def beside(self, taken: list[float]) -> Iterator[None]:
        """A turn: what is read before and after it stands for what it could have read."""
        before = self._read()
        yield
        taken.append(2 * BYTES / (before + self._read()))
        self.taken.append(taken[-1])

    def seen(self, ceiling: Limits) -> Limits:
        """With the middle of all turns as what it gave."""
        return replace(ceiling, read=statistics.median(self.taken)) if self.taken else ceiling

    def _read(self) -> float:
        """Seconds."""
        self._line.send(None)
        found: float = self._line.recv()
        return found


def _serve(line: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    big = torch.ones(BYTES // 8, dtype=torch.int64, device=_device())
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line.recv()
            times = []
            for _ in range(READS):
                start = time.perf_counter()
                big.sum().item()  # which waits for a GPU
                times.append(time.perf_counter() - start)
            line.send(statistics.median(times))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    a = torch.randn(SIDE, SIDE, device=device).to(dtype)
    b = torch.randn(SIDE, SIDE, device=device).to(dtype)
    return lambda: a @ b


def _integer_product() -> Callable[[], Tensor]:
    a = torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8)
    b = torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8)
    return lambda: torch._int_mm(a, b.T)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    found = measure(threads=options.threads)
    rows: list[harness.Row] = [
        {"what": "memory read", "rate": found.read / 1e9, "unit": "GB/s"},
        {"what": "float32 product", "rate": found.float32 / 1e9, "unit": "GFLOP/s"},
        {"what": "bfloat16 product", "rate": found.bfloat16 / 1e9, "unit": "GFLOP/s"},
        {"what": "int8 product", "rate": found.int8 and found.int8 / 1e9, "unit": "GOP/s"},
        {"what": "launch", "rate": found.launch * 1e6, "unit": "µs"},
    ]
    harness.finish("limits", rows, options, limits=asdict(found))


if __name__ == "__main__":
    main()
