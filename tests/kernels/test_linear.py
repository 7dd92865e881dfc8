"""Products of every weight format against float64, and the kernel in the interpreter."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kernels import linear as page
from kernels.backend import Call, call, differs
from kernels.linear import (
    Weight,
    dequantize,
    linear,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from tests.kernels.poison import assert_cleared, poisoned

FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "float": lambda w: w,
    "int8": quantize_int8,
    "int8 in groups": lambda w: quantize_int8(w, w.shape[1] // 32),
    "int4": lambda w: quantize_int4(w, w.shape[1] // 64),
    "int4 by row": lambda w: quantize_int4(w, 1),
    "fp8": quantize_fp8,
    "fp8 in groups": lambda w: quantize_fp8(w, w.shape[1] // 32),
}
STEPS = {"int8": 127, "int4": 7}  # from 0 to the largest


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float"])
def test_a_weight_comes_back_within_half_a_step(name: str) -> None:
    weight = torch.randn(24, 256) * torch.rand(24, 1)
    found = FORMATS[name](weight)
    assert not isinstance(found, Tensor)
    runs, back = (
        w.view(*found.scales.shape, -1) for w in (weight, dequantize(found, weight.dtype))
    )
    error, largest = (runs - back).abs(), runs.abs().amax(-1, keepdim=True)
    if name.startswith("fp8"):  # three bits of mantissa; below 2⁻⁶ of the unit, steps of 2⁻⁹
        assert (error <= (runs.abs() * 2.0**-4).clamp(min=2.0**-10 * largest / 448) * 1.001).all()
    else:
        assert (error <= largest / STEPS[name[:4]] / 2 * 1.001).all()


def test_int4_bytes_lie_as_told() -> None:
    weight = torch.arange(-7.0, 8)[None, [0, 1, 2, 3, 11, 12, 13, 14]]  # −7 −6 −5 −4, 4 5 6 7
    assert quantize_int4(weight, 1).values.tolist() == [[0xC1, 0xD2, 0xE3, 0xF4]]


@pytest.mark.parametrize("name", FORMATS)
def test_products_against_float64(name: str) -> None:
    x, weight = torch.randn(2, 3, 256), FORMATS[name](torch.randn(40, 256))
    bias = torch.randn(40)
    wanted = x.double() @ dequantize(weight, torch.float64).T + bias
    got = linear(x, weight, bias).double()
    # An int8 weight meets activations that are int8 too: 1/254 of the largest each, at random.
    close = 1e-5 if not name.startswith("int8") else 0.02
    assert ((got - wanted).norm() / wanted.norm()) < close


@pytest.mark.parametrize("groups", [1, 4])
def test_int8_rows_do_not_depend_on_the_batch(groups: int) -> None:
    x, weight = torch.randn(37, 256), quantize_int8(torch.randn(96, 256), groups)
    together = linear(x, weight)
    assert all(torch.equal(linear(x[i : i + 1], weight)[0], together[i]) for i in range(37))


def test_int8_products_are_exact_integers() -> None:
    x = torch.randint(-127, 128, (5, 64)).float()
    x[:, 0] = 127
    values = torch.randint(-127, 128, (9, 64), dtype=torch.int8)
    got = linear(x, page.Int8Weight(values, torch.ones(9, 1)))
    assert torch.equal(got, (x.long() @ values.long().T).float())


def test_gradients_flow_past_a_quantised_weight() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    weight = quantize_int8(torch.randn(8, 64))
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, dequantize(weight, torch.float32).sum(0).expand(4, -1))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_against_its_twin(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, out, inner in ((1, 33, 256), (5, 16, 64), (16, 70, 192), (40, 40, 128)):
        weight = FORMATS[name](torch.randn(out, inner).to(dtype))
        x, bias = torch.randn(rows, inner).to(dtype), torch.randn(out).to(dtype)
        made = Call((x, weight, bias if rows > 1 else None), {})
        with poisoned():
            ways = call(page.LINEAR.triton, made), call(page.LINEAR.twin, made)
        wanted = page.linear_reference(x.double(), weight, None if rows == 1 else bias.double())
        assert differs(ways[0][:1], ways[1][:1], [wanted]) == "", (rows, out, inner)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FORMATS)
def test_rows_in_parts(name: str) -> None:
    """Cut by the weight's shape alone: a row is the same bits in any company, and each time."""
    torch.manual_seed(0)
    weight, x = FORMATS[name](torch.randn(70, 640).half()), torch.randn(5, 640).half()
    bias = torch.randn(70).half()
    made = Call((x, weight, bias), {})
    with patch.object(page, "LEAST_STEPS", 1), poisoned():
        assert page._parts(3, 640 // 256)[0] > 1
        got = call(page.LINEAR.triton, made)
        assert_cleared()
        assert torch.equal(page.LINEAR.triton(x[2:3], weight, bias)[0], got[0][2])
    wanted = page.linear_reference(x.double(), weight, bias.double())
    assert differs(got[:1], call(page.LINEAR.twin, made)[:1], [wanted]) == ""


def test_weights_with_few_outputs_are_cut() -> None:
    """Llama 3.2 1B: 2048 × 2048, 2048 × 8192 and the head; steps of 128."""
    assert page._parts(2048 // 32, 2048 // 128) == (4, 4)
    assert page._parts(2048 // 32, 8192 // 128) == (4, 16)
    assert page._parts(128_256 // 32, 2048 // 128) == (1, 16)
    assert page._parts(1, 3) == (1, 3)


@pytest.mark.interpreter
@pytest.mark.parametrize("inner", [1, 7, 100, 300])
def test_rows_of_any_width(inner: int) -> None:
    x, weight = torch.randn(3, inner), torch.randn(5, inner)
    with poisoned():
        torch.testing.assert_close(linear(x, weight), x @ weight.T)
        got = linear(x, quantize_int8(weight))
    torch.testing.assert_close(got, page.linear_reference(x, quantize_int8(weight)))
    assert linear(x[:0], weight).shape == (0, 5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 8 channels and the weight takes 16"):
        linear(torch.ones(1, 8), quantize_int4(torch.ones(2, 16), 1))
    with pytest.raises(ValueError, match="a row of 10 weights cannot be cut into 3"):
        quantize_int8(torch.ones(2, 10), 3)
    with pytest.raises(ValueError, match="groups of 5 weights cannot be halved"):
        quantize_int4(torch.ones(2, 10), 2)
