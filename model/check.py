"""What the kernels of a device do and why, as lines for people."""

import torch

import model.runner  # noqa: F401 (so that every kernel of the model is defined)
from kernels import build, native
from kernels.backend import Probe, verify
from model.device import Finding


def kernels_here(device: torch.device) -> list[Finding]:
    """Tries every kernel on the device, as a server does at its start."""
    found = []
    if device.type == "cpu":
        try:
            native.enable()
            found.append(Finding("native kernels", True, f"built; int8: {_int8()}"))
        except build.NotHere as why:
            found.append(Finding("native kernels", False, str(why)))
    return found + [
        Finding(kernel, way != "torch", f"{way}: {reason}")
        for kernel, way, reason in verify(Probe(device))
    ]


def _int8() -> str:
    return "yes" if native.has_int8() else "no AVX-512 VNNI, so torch's product serves"
