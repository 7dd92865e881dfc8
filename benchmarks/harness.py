"""What every benchmark shares: honest timing, a table, a plot, and one JSON line to end with.

Machines are shared and noisy. Rivals take turns (A B A B …), the median is quoted and the spread
shown beside it, CPU time stands beside wall time, and a run that lost the processor to others
for more than a tenth of its time says so.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Times:
    """Seconds of every counted run."""

    wall: list[float]
    cpu: list[float]  # of all threads of this process
    waited: int  # times that the kernel took the processor away

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.wall) < 4:
            return (max(self.wall) - min(self.wall)) / 2 / self.median
        low, _, high = statistics.quantiles(self.wall, n=4)
        return (high - low) / 2 / self.median

    @property
    def disturbed(self) -> bool:
        return self.spread > 0.1


def take_turns(
    rivals: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 1, shown: str = ""
) -> dict[str, Times]:
    """Every rival once a round, so that drift hits all alike."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    lost = dict.fromkeys(rivals, 0)
    with tqdm(total=(rounds + warmup) * len(rivals), desc=shown, disable=None, leave=False) as bar:
        for turn in range(rounds + warmup):
            for name, rival in rivals.items():
                before = _switches()
                wall, cpu = time.perf_counter(), time.process_time()
                rival()
                _synchronise()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                if turn >= warmup:
                    found[name].append(spent)
                    lost[name] += _switches() - before
                bar.update()
    return {
        name: Times([w for w, _ in times], [c for _, c in times], lost[name])
        for name, times in found.items()
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _switches() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core")
    made.add_argument("--plot", type=Path, help="where to draw the picture (PNG)")
    made.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    made.add_argument("--label", help="what sets a kept result apart, as 'one thread'")
    return made


def table(rows: Sequence[Row]) -> None:
    """Columns as wide as they need to be; numbers right, words left."""
    names = list(rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, [name, *column])) for name, column in zip(names, zip(*cells))]
    print("  ".join(name.ljust(width) for name, width in zip(names, widths)))
    for line, row in zip(cells, rows):
        shown = (
            cell.ljust(width) if isinstance(row.get(name), str) else cell.rjust(width)
            for name, cell, width in zip(names, line, widths)
        )
        print("  ".join(shown))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "–" if value is None else str(value)


def finish(name: str, rows: Sequence[Row], options: argparse.Namespace, **more: Any) -> None:
    """The table, what is `said` of it, and the JSON line."""
    table(rows)
    for sentence in more.get("said", ()):
        print(sentence)
    record = {"benchmark": name, **conditions(), **more, "rows": [dict(row) for row in rows]}
    if options.save:
        _keep(record, options)
    print(json.dumps(record, default=str))


def _keep(record: dict[str, Any], options: argparse.Namespace) -> None:
    """In benchmarks/results/, with the picture if one was drawn."""
    RESULTS.mkdir(exist_ok=True)
    picture = getattr(options, "plot", None)
    record["label"] = getattr(options, "label", None)
    about = [record["benchmark"], record.get("shape"), *record.get("precisions", ())]
    words = [*about, record["label"], record["device"], record["commit"]]
    stem = re.sub(r"\(\w+\)", "", "-".join(filter(None, words))).replace(" ", "-").lower()
    if picture is not None:
        record["picture"] = f"{stem}{picture.suffix}"
        shutil.copyfile(picture, RESULTS / record["picture"])
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


def plot(
    path: Path | None,
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, tuple[list[float], list[float]]],
) -> None:
    """One picture: a line a rival, logarithmic along x."""
    if path is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", label=label)
    axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def conditions() -> dict[str, Any]:
    """What a number means nothing without."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "command": shlex.join(sys.orig_argv[1:]),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
