"""`cpp/`, compiled once for this very processor into the user's cache, and loaded by ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).with_name("cpp")
FLAGS = "-O2 -march=native -ffast-math -fno-finite-math-only -fno-associative-math -pthread -fPIC"


class NotHere(Exception):
    """Why there are no native kernels, in a sentence."""


def compiled() -> ctypes.CDLL:
    """Compiles at most once in this user's cache; raises NotHere."""
    found = _tried()
    if isinstance(found, NotHere):
        raise found
    return found


@cache
def _tried() -> ctypes.CDLL | NotHere:
    """A build that fails is not tried again in this process."""
    try:
        return _built()
    except NotHere as why:
        return why


def _built() -> ctypes.CDLL:
    if os.environ.get("KVIST_KERNELS") == "reference":
        raise NotHere("KVIST_KERNELS=reference")
    if sys.platform != "linux":
        raise NotHere(f"native kernels are built on Linux only, and this is {sys.platform}")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if not compiler:
        raise NotHere("no C++ compiler: install g++ and start again")
    target = _place(compiler)
    try:
        if not target.exists():
            _compile(compiler, target)
        return _typed(ctypes.CDLL(str(target)))
    except (OSError, subprocess.SubprocessError) as error:
        raise NotHere(f"{Path(compiler).name} could not build them: {error}") from error


def here() -> bool:
    try:
        compiled()
    except NotHere:
        return False
    return True


P, I64, F32, C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "use_threads": [C],
    "pack_4": [P] * 3 + [I64] * 2 + [C],
    "pack_2": [P] * 3 + [I64] * 2 + [C],
    "lookup": [P] * 4 + [I64] * 3,
    "linear_f32": [P] * 4 + [I64] * 3 + [C],
    "linear_bf16": [P] * 4 + [I64] * 3 + [C],
    "linear_f16": [P] * 4 + [I64] * 3 + [C],
    "linear_int8": [P] * 8 + [I64] * 3 + [C],
    "linear_int4": [P] * 7 + [I64] * 4 + [C],
    "attention_f32": [P] * 9 + [I64] * 10 + [F32] * 2 + [C],
    "store_f32": [P] * 11 + [I64] * 12 + [F32] + [C] * 2,
    "norm_f32": [P] * 6 + [I64] * 2 + [F32] + [C] * 2,
    "silu_gate_f32": [P] * 2 + [I64] * 2 + [C],
    "gelu_tanh_gate_f32": [P] * 2 + [I64] * 2 + [C],
    "silu_f32": [P] * 2 + [I64, C],
    "gelu_tanh_f32": [P] * 2 + [I64, C],
    "best_f32": [P] * 3 + [I64] * 2 + [C],
    "draw_f32": [P] * 5 + [I64] * 2 + [C],
    "log_softmax_f32": [P] * 2 + [I64] * 2 + [C],
    "top_f32": [P] * 6 + [I64] * 4 + [C],
    "stack_f32": [P] * 4,
}


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    for name, kinds in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = kinds, None
    return found


def _place(compiler: str) -> Path:
    """A file a source, a compiler and a processor; the flags of -march=native are in /proc."""
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if os.path.exists("/proc") else ""
    kind = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))]
    texts = [path.read_text() for path in sorted(SOURCES.iterdir())]
    told = [*texts, FLAGS, compiler, platform.machine(), torch.__version__, *kind]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "kvist" / f"native-{name}.so"


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: build for this process alone
        target = Path(tempfile.mkdtemp()) / target.name
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as crowd:
        built = f"{target}.{os.getpid()}"

        def unit(source: Path) -> str:
            made = f"{folder}/{source.stem}.o"
            _run(compiler, *FLAGS.split(), "-c", str(source), "-o", made)
            return made

        _run(compiler, "-shared", *crowd.map(unit, SOURCES.glob("*.cpp")), "-o", built)
        os.replace(built, target)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603
