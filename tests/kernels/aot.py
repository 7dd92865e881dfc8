"""Compiles launches for GPUs that are not here, and reads what the compiler made of them.

Triton's wheel carries ptxas, cuobjdump and nvdisasm, so neither a GPU nor a driver is needed. A
launch is caught with `backend.pretend` and specialised as Triton would on the spot: pointers and
integers that 16 divides, integers that are 1. So what is read here is what would run there.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Device, Kernel, Launch, Probe, pretend, triton

DEVICES = {
    80: Device("an A100", 80, 108),
    90: Device("an H200", 90, 132),
    120: Device("an RTX 5090", 120, 170),
}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may ask for
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvist" / "compiled"

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel, as the assembler left it."""

    name: str
    arch: int
    variant: str  # its constants and types, for people
    registers: int
    spills: int  # instructions that touch local memory
    stack: int  # bytes
    shared: int  # bytes
    warps: int
    products: int  # tensor core instructions
    copies: int  # asynchronous copies: cp.async and TMA
    wide: int  # loads of 16 bytes
    narrow: int  # loads of one or two bytes
    seconds: float  # to compile

    def faults(self, copies: bool = False, narrow: bool = False) -> list[str]:
        """What breaks the rules of the house. `copies`: it must load asynchronously;
        `narrow`: it has a reason to load single numbers of one or two bytes."""
        limit = SHARED_LIMIT[self.arch]
        found = {
            f"{self.spills} instructions touch local memory": self.spills,
            f"{self.stack} bytes of stack": self.stack,
            f"{self.shared} bytes of shared memory, and {limit} is the limit": self.shared > limit,
            "no asynchronous copies": copies and not self.copies,
            f"{self.narrow} loads of one or two bytes": self.narrow and not narrow,
        }
        return [f"{self}: {fault}" for fault, there in found.items() if there]

    def __str__(self) -> str:
        return f"{self.name} sm_{self.arch} [{self.variant}]"


def launches(kernel: Kernel, probe: Probe, arch: int) -> list[Launch]:
    """What the kernel's trial calls would launch on a GPU of that architecture."""
    with pretend(DEVICES[arch]) as kept:
        for trial in kernel.trial(probe):
            kernel(*trial.args, **trial.kwargs)
        return list(kept)


def compile_all(made: Iterable[Launch], arch: int) -> Iterator[Compiled]:
    """Each variant once."""
    seen = set()
    for one in made:
        source, options = _specialise(one)
        if (key := _key(source, options, arch)) not in seen:
            seen.add(key)
            yield _cached(key, source, options, arch)


def _specialise(made: Launch) -> tuple[Any, dict[str, Any]]:
    """→ Triton's source of exactly this variant, and its compile options"""
    kernel = made.kernel
    given = {p.name: p.default for p in kernel.params if p.has_default}
    given |= dict(zip(kernel.arg_names, made.args))
    given |= {name: v for name, v in made.options.items() if name in kernel.arg_names}
    options = {name: v for name, v in made.options.items() if name not in kernel.arg_names}
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind, constant, sixteen = _argument(value)
        if parameter.is_constexpr or constant:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = kind
        if sixteen and not (parameter.is_constexpr or constant):
            divisible[(i,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(kernel, signature, constants, divisible), options


def _argument(value: Any) -> tuple[str, bool, bool]:
    """→ its type, whether Triton makes a constant of it, whether 16 divides it"""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], False, value.data_ptr() % 16 == 0
    if value is None or isinstance(value, bool):
        return "i1", value is None, False
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64", value == 1, value % 16 == 0
    return "fp32", False, False


def _key(source: Any, options: dict[str, Any], arch: int) -> str:
    words = f"{triton.__version__} {source.hash()} {sorted(options.items())} {arch}"
    own = Path(__file__).read_bytes()
    return hashlib.sha256(words.encode() + own).hexdigest()


def _cached(key: str, source: Any, options: dict[str, Any], arch: int) -> Compiled:
    path = CACHE / f"{key}.json"
    if not path.exists():
        made = _compile(source, options, arch)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
            json.dump(asdict(made), file)
        Path(file.name).replace(path)  # whole or not at all: tests run side by side
    return Compiled(**json.loads(path.read_text()))


def _compile(source: Any, options: dict[str, Any], arch: int) -> Compiled:
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    began = time.perf_counter()
    made = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    seconds = time.perf_counter() - began
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = Counter(_OPERATION.findall(_tool("nvdisasm", "-c", cubin.name)))
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))

    def count(pattern: str) -> int:
        return sum(n for operation, n in code.items() if re.match(pattern, operation))

    return Compiled(
        name=source.name,
        arch=arch,
        variant=_variant(source, options),
        registers=int(resources["REG"]),
        spills=count(r"LDL|STL"),
        stack=int(resources["STACK"]),
        shared=made.metadata.shared,
        warps=made.metadata.num_warps,
        products=count(r"[HQI]G?MMA"),
        copies=count(r"LDGSTS|UTMALDG|UBLKCP"),
        wide=count(r"LDG\.(.*\.)?128"),
        narrow=count(r"LDG\.(.*\.)?[US](8|16)"),
        seconds=round(seconds, 2),
    )


_OPERATION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def _tool(name: str, *arguments: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [tools / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _variant(source: Any, options: dict[str, Any]) -> str:
    constants = {source.fn.arg_names[i]: v for (i,), v in sorted(source.constants.items())}
    types = [kind for kind in source.signature.values() if kind.startswith("*")]
    words = [f"{name}={value}" for name, value in {**constants, **options}.items()]
    return " ".join([types[0].removeprefix("*") if types else "", *words])
