"""What this machine can do: the ceilings that every other benchmark is held against.

    python -m benchmarks.limits

Memory read bandwidth, matrix rates by number format, and what a launch or an empty step costs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks import harness

SIDE = 2048  # of the matrices
BYTES = 1 << 30  # read for the bandwidth, far beyond any cache


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        read=BYTES / best["read"],
        float32=work / best["float32"],
        bfloat16=work / best["bfloat16"],
        int8=work / best["int8"] if "int8" in best else None,
        launch=best["launch"] / 1000,
    )


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
