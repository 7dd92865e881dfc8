"""What processes have used, as the kernel counts it in /proc."""

import os
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and all that came of it: a server has several."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def seconds(pid: int) -> float:
    """That it has computed, in steps of the kernel's clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak(pid: int) -> int:
    """Bytes of memory at the most; `getrusage` would count the parent's before it began."""
    return _bytes(pid, "VmHWM")


def anonymous(pid: int) -> int:
    """Bytes that it has for itself, and no file behind them."""
    return _bytes(pid, "RssAnon", "VmSwap")


def _bytes(pid: int, *names: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(names))
