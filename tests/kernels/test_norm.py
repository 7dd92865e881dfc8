"""Norms against float64, the kernels in the interpreter against the twins."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import norm
from kernels.backend import Call, call, differs
from tests.kernels.poison import poisoned

SHAPES = [(1, 1), (5, 7), (3, 64), (2, 3, 128), (4, 1000), (1, 4096)]


def arguments(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    x, residual = (3 * torch.randn(shape).to(dtype) + 1 for _ in range(2))
    inputs = (x, residual) if "ADD" in name else (x,)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    if "RMS" in name:
        return Call((*inputs, weight, 1e-5), {"offset": 1.0})
    return Call((*inputs, weight, bias, 1e-5), {})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["RMS_NORM", "LAYER_NORM", "ADD_RMS_NORM", "ADD_LAYER_NORM"])
def test_twins_against_float64(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = getattr(norm, name)
    for dtype in (torch.float32, torch.bfloat16):
        made = arguments(name, shape, dtype)
        args = [a.double() if isinstance(a, Tensor) else a for a in made.args]
        got, wanted = kernel.twin(*made.args, **made.kwargs), exact(name, *args, **made.kwargs)
        for one, other in zip(got if "ADD" in name else (got,), wanted):
            close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(one.double(), other, rtol=close, atol=close)


def exact(name: str, x: Tensor, *rest: Tensor, offset: float = 0.0) -> tuple[Tensor, ...]:
    """The formulas at the top of the file, as a mathematician would write them."""
    total = x + rest[0] if "ADD" in name else x
    rest = rest[1:] if "ADD" in name else rest
    weight, eps = rest[0], rest[-1]
    if "RMS" in name:
        return total / (total.pow(2).mean(-1, True) + eps).sqrt() * (weight + offset), total
    spread = (total.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return (total - total.mean(-1, True)) / spread * weight + rest[1], total


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_against_twins(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for name in ("RMS_NORM", "LAYER_NORM", "ADD_RMS_NORM", "ADD_LAYER_NORM"):
        kernel, made = getattr(norm, name), arguments(name, shape, dtype)
        with poisoned():
            ways = call(kernel.triton, made), call(kernel.twin, made)
        assert differs(*ways, call(kernel.twin, made, exactly=True)) == "", (name, shape)


@pytest.mark.interpreter
def test_weights_may_be_missing_and_rows_none() -> None:
    x = torch.randn(4, 33)
    got = norm.layer_norm(x, None, None, 1e-5)
    torch.testing.assert_close(got, norm.layer_norm_reference(x, None, None, 1e-5))
    assert norm.rms_norm(x[:0], torch.ones(33), 1e-5).shape == (0, 33)


@pytest.mark.interpreter
def test_a_row_in_a_crowd_is_the_row_alone() -> None:
    x, weight = torch.randn(9, 96), torch.randn(96)
    together = norm.rms_norm(x, weight, 1e-6)
    assert all(
        torch.equal(norm.rms_norm(x[i : i + 1], weight, 1e-6)[0], together[i]) for i in range(9)
    )


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: norm.rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5), r"is \[5\], expected \[4\]"),
    (lambda: norm.layer_norm(torch.ones(2, 4), None, torch.ones(1), 1e-5), r"is \[1\], expected"),
    (lambda: norm.rms_norm(torch.ones(1, 1 << 17), torch.ones(1), 1e-5), "rows of 131072"),
    (
        lambda: norm.add_rms_norm(torch.ones(2, 4), torch.ones(1, 4), torch.ones(4), 1e-5),
        r"residual is \[1, 4\]",
    ),
]


@pytest.mark.parametrize(("act", "words"), WRONG)
def test_what_does_not_fit_is_refused(act: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act()
