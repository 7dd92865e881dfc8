"""`python -m server doctor`: what this machine can run, and why not the rest."""

import importlib.metadata
import platform
import sys

import torch

from model import device
from model.check import kernels_here
from model.checkpoint import CheckpointError, locate
from model.families import FAMILIES


def findings() -> list[device.Finding]:
    return [
        _python(),
        device.Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        _package("triton", "GPU kernels"),
        _package("tiktoken", "byte-level tokenizers"),
        _package("tokenizers", "the other tokenizers"),
        _gpu(),
        _cpu(),
        *kernels_here(device.pick_device("auto")),
        _memory(),
        _embedded(),
        device.Finding("families", True, ", ".join(sorted(FAMILIES))),
    ]


def run() -> int:
    """Prints one line a finding; 1 when something that is needed is missing."""
    report = findings()
    width = max(len(finding.name) for finding in report)
    for finding in report:
        print(f"{'✓' if finding.good else '–'} {finding.name:<{width}}  {finding.text}")
    needed = {"python", "torch", "tiktoken", "tokenizers"}
    return int(any(not finding.good and finding.name in needed for finding in report))


def _python() -> device.Finding:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    return device.Finding("python", good, f"{platform.python_version()}; Kvist needs 3.11 to 3.13")


def _package(name: str, use: str) -> device.Finding:
    try:
        return device.Finding(name, True, f"{importlib.metadata.version(name)}, for {use}")
    except importlib.metadata.PackageNotFoundError:
        return device.Finding(name, False, f"not installed; it is for {use}")


def _gpu() -> device.Finding:
    if not torch.cuda.is_available():
        return device.Finding("gpu", False, device.why_no_gpu())
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return device.Finding("gpu", True, ", ".join(names))


def _cpu() -> device.Finding:
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "sve")
    units = [flag for flag in known if flag in device.cpu_flags()]
    return device.Finding("cpu", True, f"{device.cores()} cores, {' '.join(units) or 'no SIMD'}")


def _memory() -> device.Finding:
    free = device.free_memory(torch.device("cpu"))
    return device.Finding("memory", True, f"{free / 2**30:.1f} GiB free")


def _embedded() -> device.Finding:
    try:
        locate(None)
    except CheckpointError as error:
        return device.Finding("embedded model", False, str(error))
    return device.Finding("embedded model", True, "here; `make run` serves it")
