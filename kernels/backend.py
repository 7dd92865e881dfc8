"""The one place that knows which way a kernel runs on a device, and can say why.

A kernel has up to three ways with one signature: `twin` (plain torch: the oracle, and the way of
gradients), `triton` (CUDA, or any device inside Triton's interpreter) and `native` (CPU). A
kernel's file makes one `Kernel` of them and calls it:

    _NORM = Kernel("rms_norm", twin=rms_norm_reference, triton=_launch, trial=_trial)

    def rms_norm(x, weight, eps): …check…; return _NORM(x, weight, eps)

Trust is checked on the spot: `verify` makes each kernel's trial calls on the device and compares
them with the twin. A kernel that differs, or fails, is not used there, and `choose` says so.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class Absent:
    """Stands in for `triton` and `tl` where Triton is not installed: anything at all."""

    def __getattr__(self, name: str) -> "Absent":
        return self

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


try:
    import triton
    import triton.language as tl
except ImportError:  # kernels are still defined, and never run
    triton = tl = Absent()

HAS_TRITON = not isinstance(triton, Absent)

__all__ = ["tl", "triton"]  # kernels import them from here; the rest is made here

Way = Literal["triton", "native", "torch"]
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
WISH = os.environ.get("KVIST_KERNELS", "auto")
if WISH not in ("auto", "triton", "reference"):
    raise ValueError(f"KVIST_KERNELS={WISH!r}: expected auto, triton (also untrusted) or reference")


@dataclass(frozen=True)
class Device:
    """What a kernel's configuration may depend on."""

    name: str
    arch: int  # 90 is sm_90; 0: not an NVIDIA GPU
    processors: int  # that run thread blocks side by side


class Choice(NamedTuple):
    kernel: str
    way: Way
    reason: str


class Call(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Launch(NamedTuple):
    """A launch that was kept instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """What trial calls should look like: the sizes decide which variants of a kernel they try."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 256
    feed_forward: int = 512
    vocabulary: int = 1000
    page: int = 16
    page_dtype: torch.dtype | None = None  # of keys and values in pages; None: dtype
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    turned: int | None = None  # channels of a head that turn; None: all
    interleaved: bool = False
    normed: bool = False  # queries and keys, each head by itself

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normally distributed, the same on every device."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device, self.dtype)


KERNELS: "dict[str, Kernel]" = {}
_pretended: Device | None = None
_kept: list[Launch] = []


@dataclass(eq=False)
class Kernel:
    """One operation's ways. `trial` makes the small calls to compare them with."""

    name: str
    twin: Callable[..., Any]
    triton: Callable[..., Any]
    trial: Callable[[Probe], Iterable[Call]]
    native: Callable[..., Any] | None = None  # set by whoever brings a CPU way
    faults: dict[Device, str] = field(default_factory=dict)  # why it is not trusted there

    def __post_init__(self) -> None:
        KERNELS[self.name] = self

    def choose(self, where: torch.device) -> Choice:
        device = describe(where)
        if WISH == "reference":
            return Choice(self.name, "torch", "KVIST_KERNELS=reference")
        if self.native and not device.arch and not INTERPRETED:
            return Choice(self.name, "native", f"native on {device.name}")
        if fault := self.faults.get(device, ""):
            return Choice(self.name, "torch", fault)
        if why_not := _why_not(device):
            return Choice(self.name, "torch", why_not)
        return Choice(self.name, "triton", f"Triton on {device.name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the way of the first argument's device; gradients flow through the twin."""
        way = "torch" if _wants_gradients(args) else self.choose(args[0].device).way
        if way == "native" and self.native:
            return self.native(*args, **kwargs)
        return (self.triton if way == "triton" else self.twin)(*args, **kwargs)


def _wants_gradients(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _why_not(device: Device) -> str:
    """Why Triton does not run there; empty: it does."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED or device.arch >= 80 or (device.arch and WISH == "triton"):
        return ""
    if device.arch:
        return f"{device.name} is sm_{device.arch}, and kernels are proved from sm_80 on"
    return f"{device.name} is not an NVIDIA GPU"


def describe(where: torch.device) -> Device:
    return _pretended or _describe(where)


@cache
def _describe(where: torch.device) -> Device:
    if where.type != "cuda":
        return Device("Triton's interpreter" if INTERPRETED else f"this {where.type}", 0, 4)
    found = torch.cuda.get_device_properties(where)
    arch = 0 if torch.version.hip else found.major * 10 + found.minor
    return Device(found.name, arch, found.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), through which every launch of the house goes."""
    if _pretended:
        _kept.append(Launch(kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


@contextmanager
def pretend(device: Device) -> Iterator[list[Launch]]:
    """As if every tensor were on `device`: launches are kept in the list given, and not run.

    So the very launches of a GPU can be compiled ahead of time, or counted, where there is none.
    """
    global _pretended
    _pretended = device
    try:
        yield _kept
    finally:
        _pretended = None
        _kept.clear()


_counters: dict[torch.device, list[Tensor]] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """[≥ count] int32, 0 between launches: where blocks count who has arrived, and the last one
    clears up. Old ones are kept, for graphs that count there."""
    made = _counters.setdefault(device, [])
    if not made or made[-1].numel() < count:
        size = 1 << (max(count, 4096) - 1).bit_length()
        made.append(torch.zeros(size, dtype=torch.int32, device=device))
    return made[-1]


def verify(probe: Probe) -> list[Choice]:
    """Tries every kernel that would run by Triton on the probe's device, once at start."""
    for kernel in KERNELS.values():
        if WISH != "triton" and kernel.choose(probe.device).way == "triton":
            fault = next(filter(None, (_fault(kernel, c) for c in kernel.trial(probe))), "")
            if fault:
                kernel.faults[describe(probe.device)] = fault
    return [kernel.choose(probe.device) for kernel in KERNELS.values()]


def _fault(kernel: Kernel, trial: Call) -> str:
    try:
        return differs(
            call(kernel.triton, trial),
            call(kernel.twin, trial),
            call(kernel.twin, trial, exactly=True),
        )
    except Exception as error:  # a driver, compiler or card that nobody here has seen
        return f"{type(error).__name__}: {error}"


def call(way: Callable[..., Any], trial: Call, exactly: bool = False) -> list[Tensor]:
    """Everything that a call returned or may have written; `exactly`: in the next wider type."""
    args = [_copy(a, exactly) for a in trial.args]
    kwargs = {name: _copy(a, exactly) for name, a in trial.kwargs.items()}
    result = way(*args, **kwargs)
    results = result if isinstance(result, tuple) else (result,)
    return [t for t in (*results, *args, *kwargs.values()) if isinstance(t, Tensor)]


def _copy(a: Any, exactly: bool) -> Any:
    wider = {torch.float32: torch.float64, torch.float16: torch.float32}
    wider[torch.bfloat16] = torch.float32
    if not isinstance(a, Tensor):
        return a
    return a.clone().to(wider.get(a.dtype, a.dtype) if exactly else a.dtype)


def differs(got: list[Tensor], own: list[Tensor], wanted: list[Tensor]) -> str:
    """What is wrong with `got`, in a sentence; empty: nothing.

    Its error may be twice the error of torch's `own` result in the same type, both against what
    is `wanted` (the same in a wider type), and one rounding on top.
    """
    for i, (ours, torchs, exact) in enumerate(zip(got, own, wanted, strict=True)):
        rounding = _rounding(ours.dtype, exact := exact.double())
        ours, torchs = ours.double(), torchs.double()
        allowed = 2 * (torchs - exact).abs().nan_to_num().amax() if exact.numel() else 0
        error = (ours - exact).abs()
        same = (error <= allowed + rounding) | (exact.isnan() & ours.isnan()) | (ours == exact)
        if not bool(same.all()):
            worst = float(error[~same].max())
            return f"result {i} is off by {worst:.3g} in {int((~same).sum())} places"
    return ""


def _rounding(dtype: torch.dtype, exact: Tensor) -> Tensor:
    """How far apart neighbours in `dtype` are; for float32, what sums in another order differ."""
    if not dtype.is_floating_point:
        return torch.full_like(exact, 1 if dtype == torch.int8 else 0)
    step = torch.finfo(dtype).eps
    finite = exact.nan_to_num(0, 0, 0).abs()
    largest = finite.amax() if exact.numel() else 0
    if dtype == torch.float32:
        return 8 * step * (finite + largest)
    return step * (finite + torch.finfo(dtype).smallest_normal)
