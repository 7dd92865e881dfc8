"""The one place that knows which way a kernel runs on a device, and can say why.

A kernel has up to three ways with one signature: `twin` (plain torch: the oracle, and the way of
gradients), `triton` (CUDA, or any device inside Triton's interpreter) and `native` (CPU). A
kernel's file makes one `Kernel` of them and calls it:

    _NORM = Kernel("rms_norm", twin=rms_norm_reference, triton=_launch, trial=_trial)

    def rms_norm(x, weight, eps): …check…; return _NORM(x, weight, eps)
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # kernels are still defined, and never run
    HAS_TRITON = False

    class _Absent:
        """Stands in for `triton` and `tl` where Triton is not installed: anything at all."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: Any, **_: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Absent()

__all__ = ["INTERPRETED", "KERNELS", "Call", "Kernel", "Way", "tl", "triton"]

Way = Literal["triton", "native", "torch"]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one call

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
WISH = os.environ.get("KVIST_KERNELS", "auto")  # auto, triton or reference

KERNELS: "dict[str, Kernel]" = {}


@dataclass(eq=False)
class Kernel:
    """One operation's ways. `trial` makes small calls to compare them with on a device."""

    name: str
    twin: Callable[..., Any]
    triton: Callable[..., Any]
    trial: Callable[[torch.device], Iterable[Call]]
    native: Callable[..., Any] | None = None  # set by whoever brings a CPU way

    def __post_init__(self) -> None:
        KERNELS[self.name] = self

    def way(self, device: torch.device) -> Way:
        if WISH == "reference":
            return "torch"
        if INTERPRETED or (HAS_TRITON and device.type == "cuda"):
            return "triton"
        return "native" if self.native and device.type == "cpu" else "torch"

    def __call__(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the way of `first`'s device; gradients flow through the twin."""
        way = "torch" if first.requires_grad and torch.is_grad_enabled() else self.way(first.device)
        if way == "triton":
            return self.triton(first, *args, **kwargs)
        if way == "native" and self.native:
            return self.native(first, *args, **kwargs)
        return self.twin(first, *args, **kwargs)
