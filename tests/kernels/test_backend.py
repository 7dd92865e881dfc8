"""What decides which way a kernel runs, and the trust that it is checked for."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.backend import KERNELS, Call, Device, Kernel, Probe, pretend, verify

CPU = torch.device("cpu")
CARD = Device("a card", 90, 132)


def double(x: Tensor) -> Tensor:
    return x * 2


def triple(x: Tensor) -> Tensor:
    return x * 3


@pytest.fixture
def alone() -> Iterator[None]:
    """No kernels but the test's own."""
    kept = dict(KERNELS)
    KERNELS.clear()
    yield
    KERNELS.clear()
    KERNELS.update(kept)


def trial(probe: Probe) -> list[Call]:
    return [Call((probe.random(33),), {})]


@pytest.mark.usefixtures("alone")
def test_a_right_kernel_is_trusted_and_a_wrong_one_is_not() -> None:
    Kernel("right", twin=double, triton=double, trial=trial)
    Kernel("wrong", twin=double, triton=triple, trial=trial)
    with pretend(CARD):
        right, wrong = verify(Probe(CPU, torch.bfloat16))
        assert right.way == "triton"
        assert right.reason == "Triton on a card"
        assert wrong.way == "torch"
        assert "is off by" in wrong.reason
        assert torch.equal(KERNELS["wrong"](torch.ones(2)), torch.full((2,), 2.0))
        assert KERNELS["wrong"].choose(CPU) == wrong
    with pretend(Device("another card", 90, 132)):
        assert KERNELS["wrong"].choose(CPU).way == "triton", "only where it failed"


@pytest.mark.usefixtures("alone")
def test_a_kernel_that_raises_is_not_trusted_and_the_reason_is_told() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such instruction")

    Kernel("broken", twin=double, triton=broken, trial=trial)
    with pretend(CARD):
        assert verify(Probe(CPU))[0].reason == "RuntimeError: no such instruction"


@pytest.mark.usefixtures("alone")
def test_what_is_written_in_place_is_compared_too() -> None:
    def fill(x: Tensor) -> None:
        x.fill_(1)

    def forget(x: Tensor) -> None:
        pass

    Kernel("fill", twin=fill, triton=forget, trial=trial)
    with pretend(CARD):
        assert "is off by" in verify(Probe(CPU))[0].reason


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device("a Radeon", 0, 64), "a Radeon is not an NVIDIA GPU"),
        (Device("a T4", 75, 40), "a T4 is sm_75, and kernels are proved from sm_80 on"),
    ],
)
def test_what_is_not_proved_there_runs_in_torch(device: Device, reason: str) -> None:
    kernel = Kernel("double", twin=double, triton=triple, trial=trial)
    with pretend(device):
        assert kernel.choose(CPU) == ("double", "torch", reason)


@pytest.mark.usefixtures("alone")
def test_gradients_flow_through_the_twin() -> None:
    kernel = Kernel("double", twin=double, triton=triple, trial=trial)
    x = torch.ones(2, requires_grad=True)
    with pretend(CARD):
        assert kernel(x).tolist() == [2, 2]
        with torch.no_grad():
            assert kernel(x).tolist() == [3, 3]


@pytest.mark.usefixtures("alone")
def test_a_native_way_is_taken_on_the_cpu_alone() -> None:
    kernel = Kernel("double", twin=double, triton=triple, trial=trial, native=lambda x: x * 4)
    assert kernel(torch.ones(1)).item() == 4
    with pretend(CARD):
        assert kernel(torch.ones(1)).item() == 3


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("wish", "way"), [("reference", "torch"), ("auto", "triton")])
def test_a_wish_decides(monkeypatch: pytest.MonkeyPatch, wish: str, way: str) -> None:
    monkeypatch.setattr(backend, "WISH", wish)
    kernel = Kernel("double", twin=double, triton=triple, trial=trial)
    with pretend(CARD):
        assert kernel.choose(CPU).way == way


def test_one_rounding_is_forgiven_and_two_are_not() -> None:
    exact = torch.tensor([1.0, 2.0])
    own = exact.bfloat16()
    assert backend.differs([own], [own], [exact]) == ""
    assert backend.differs([own * (1 + 2**-7)], [own], [exact]) == ""
    assert "off by" in backend.differs([own * (1 + 2**-5)], [own], [exact])
    assert "off by" in backend.differs([own * torch.nan], [own], [exact])


def test_kernels_are_defined_without_triton() -> None:
    """The stand-ins take every shape that a kernel's file gives them."""
    absent = backend.Absent()
    assert absent.jit(double) is double
    assert absent.constexpr.anything is absent
    assert absent.jit(do_not_specialize=["x"])(double) is double


def test_everything_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
from importlib import import_module
from pathlib import Path
import torch, kernels
for file in Path(kernels.__file__).parent.glob("*.py"):
    import_module(f"kernels.{file.stem}")
from kernels.backend import HAS_TRITON, KERNELS, Probe, verify
assert not HAS_TRITON and KERNELS
assert {choice.way for choice in verify(Probe(torch.device("cpu")))} <= {"torch", "native"}
for kernel in KERNELS.values():
    for trial in kernel.trial(Probe(torch.device("cpu"))):
        kernel(*trial.args, **trial.kwargs)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
