"""What this machine is: the device, the number format that suits it, threads, memory."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    good: bool
    text: str


def pick_device(wish: str = "auto") -> torch.device:
    """`auto` is the GPU if one answers; a device that is not there is an error, not a fallback."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wish):
        raise ValueError(f"device is {wish!r}; expected auto, cpu, cuda or cuda:1 and so on")
    device = torch.device(wish)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wish!r} was asked for, and {why_no_gpu()}")
    return device


def why_no_gpu() -> str:
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "no CUDA device answers; see nvidia-smi, and whether the driver fits this torch"


def pick_dtype(wish: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """`auto` keeps the checkpoint's format where the device computes in it, else takes float32."""
    if wish != "auto":
        return DTYPES[wish]
    if device.type == "cuda":
        return stored if stored in (torch.float16, torch.bfloat16) else torch.float32
    fast = stored == torch.bfloat16 and has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; without, it is slower than float32."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def cores() -> int:
    """Physical cores that this process may use: two threads on one core fight for its units."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return len(siblings)


def free_memory(device: torch.device) -> int:
    """Bytes that a cache may take from."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    lines = Path("/proc/meminfo").read_text().splitlines()
    here = next(line for line in lines if line.startswith("MemAvailable:"))
    limit = _read_int("/sys/fs/cgroup/memory.max")
    available = int(here.split()[1]) * 1024
    return available if limit is None else min(available, limit)


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
