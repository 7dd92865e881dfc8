"""How fast every kernel is, against what the machine can do and against everybody else.

    python -m benchmarks.kernels             # on a GPU: times, rates, ratios
    python -m benchmarks.kernels --list      # anywhere: every variant as the compiler left it
    python -m benchmarks.kernels --dry-run   # anywhere: every case once, small, interpreted

Inputs are random and rotate over more than the cache holds; calls replay from a CUDA graph; rivals
take turns; the median counts. Ratios are to ceilings measured in the same minute.
"""

import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from benchmarks import harness
from benchmarks.kernel_cases import Bench, Case, Rival, Work, cases
from kernels.backend import HAS_TRITON, INTERPRETED, KERNELS
from tests.kernels.aot import DEVICES, Compiled, compile_all, launches
from tests.kernels.variants import variants

ROUNDS = 50
GRAPH = 40  # calls in one replay, so that its own launch weighs little


@dataclass(frozen=True)
class Ceilings:
    copy: float  # bytes/s, read and written
    product: float  # bfloat16 operations/s


def main() -> None:
    options = _options()
    if options.list:
        _list(options)
    else:
        _run(options)


def _run(options: Namespace) -> None:
    if options.dry_run and not INTERPRETED:
        sys.exit(_again_interpreted())
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("There is no CUDA device to time kernels on: try --list or --dry-run.")
    if options.dry_run:
        bench, ceilings = Bench(torch.device("cpu"), True, torch.float16), None
    else:
        bench = Bench(torch.device("cuda"), False, torch.bfloat16)
        ceilings = _ceilings()
    rows: list[harness.Row] = []
    chosen = [case for case in cases() if options.only in case.kernel]
    chosen = [case for case in chosen if not (bench.small and case.again)]
    for case in tqdm(chosen, desc="kernels", disable=None, leave=False):
        rows += _measure(case, bench, ceilings)
        if not bench.small:
            torch.cuda.empty_cache()
    found = {} if ceilings is None else vars(ceilings)
    harness.finish("kernels", rows, options, dry_run=options.dry_run, ceilings=found)
    if any(row["rival"] == "kvist" and row["note"] for row in rows):
        sys.exit("A kernel of ours failed: see its note above.")


def _options() -> Namespace:
    made: ArgumentParser = harness.parser(__doc__)
    made.add_argument("--list", action="store_true", help="every variant, compiled ahead of time")
    made.add_argument("--arch", type=int, choices=list(DEVICES), help="--list: only for this sm_…")
    made.add_argument("--dry-run", action="store_true", help="every case small, interpreted")
    made.add_argument("--only", default="", help="the cases or kernels whose name has this in it")
    return made.parse_args()


def _again_interpreted() -> int:
    """Triton decides when it is imported whether it compiles or interprets."""
    if not HAS_TRITON:
        print("Triton is not installed here, so nothing can be interpreted.", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:]]
    return subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False
    ).returncode


def _list(options: Namespace) -> None:
    for file in Path(kernels.__file__).parent.glob("*.py"):
        import_module(f"kernels.{file.stem}")
    wanted = [
        (name, probe, arch)
        for name in sorted(KERNELS)
        if options.only in name
        for probe in variants(name).probes
        for arch in ([options.arch] if options.arch else DEVICES)
    ]
    found: dict[Compiled, None] = {}
    for name, probe, arch in tqdm(wanted, desc="compiling", disable=None, leave=False):
        found |= dict.fromkeys(compile_all(launches(KERNELS[name], probe, arch), arch))
    rows: list[harness.Row] = [
        {
            "kernel": one.name,
            "sm": one.arch,
            "configuration": _words(one, chosen=True),
            "registers": one.registers,
            "spills": one.spills,
            "shared": one.shared,
            "tensor ops": one.products,
            "async copies": one.copies,
            "variant": _words(one, chosen=False),
        }
        for one in found
    ]
    harness.finish("kernel_variants", rows, options)


def _words(made: Compiled, chosen: bool) -> str:
    """Of a variant: what the kernel's table has chosen, or what was asked of it."""
    table = ("BLOCK", "ROWS=", "num_")
    words = [word for word in made.variant.split() if word.startswith(table) == chosen]
    return " ".join(words).replace("num_", "")


def _measure(case: Case, bench: Bench, ceilings: Ceilings | None) -> list[harness.Row]:
    """A row a rival."""
    work = case.make(bench)
    times: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, rival in work.rivals.items():
        try:
            times[name] = _try(rival, work) if ceilings is None else _time(rival, work)
        except Exception as error:  # a peer that cannot do this shape is told, not hidden
            notes[name] = f"{type(error).__name__}: {error}".split("\n")[0][:80]
    ours = times.get("kvist")
    best = min((t for name, t in times.items() if name != "kvist"), default=None)
    return [
        {
            "kernel": case.kernel,
            "shape": case.shape,
            "rival": name,
            **_rates(times.get(name), work, ceilings),
            "vs best": best / ours if name == "kvist" and best and ours and ceilings else None,
            "note": notes.get(name, ""),
        }
        for name in work.rivals
    ]


def _rates(seconds: float | None, work: Work, ceilings: Ceilings | None) -> dict[str, float | None]:
    names = ("µs", "TB/s", "of copy", "TFLOP/s", "of product")
    if seconds is None or ceilings is None:
        return dict.fromkeys(names)
    read, done = work.bytes / seconds, work.operations / seconds
    ratios = (
        seconds * 1e6,
        read / 1e12,
        read / ceilings.copy,
        done / 1e12,
        done / ceilings.product,
    )
    return dict(zip(names, ratios))


def _try(rival: Rival, work: Work) -> float:
    for i in range(work.copies):
        rival(i)
    return 0.0


def _time(rival: Rival, work: Work) -> float:
    """Seconds of one call: the median of many replays of a graph that goes round the copies."""
    for i in range(work.copies):
        rival(i)
    calls = max(1, GRAPH // work.copies) * work.copies
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            rival(i % work.copies)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spent = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return statistics.median(spent) / 1e3 / calls


def _ceilings() -> Ceilings:
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(big)
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    copying = _time(lambda _: target.copy_(big), Work(0))
    multiplying = _time(lambda _: a @ b, Work(0))
    return Ceilings(2 * big.nbytes / copying, 2 * side**3 / multiplying)


if __name__ == "__main__":
    main()
