"""Activations against transformers' own, the kernels in the interpreter against the twins.

transformers is imported where it is needed: the interpreter's process loads this page as well.
"""

import pytest
import torch

from kernels import activation
from kernels.activation import KINDS, SIMPLE, activate, gate
from kernels.backend import Call, call, differs
from tests.kernels.poison import poisoned

NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
SHAPES = [(1, 2), (3, 10), (2, 2, 66), (2, 3000)]


@pytest.mark.parametrize("kind", SIMPLE)
def test_kinds_are_those_of_transformers(kind: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 1000)[None]
    wanted = ACT2FN[NAMES[kind]](x)
    assert torch.equal(activation.activate_reference(x, kind), wanted)
    half, up = x.chunk(2, -1)
    torch.testing.assert_close(gate(x, kind), ACT2FN[NAMES[kind]](half) * up)


def test_swigluoai_is_gpt_oss() -> None:
    """Their gate and up take turns, ours are halves."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    halves = 5 * torch.randn(7, 40)
    turns = halves.view(7, 2, 20).transpose(1, 2).flatten(1)
    theirs = object.__new__(GptOssExperts)
    theirs.__dict__.update(alpha=1.702, limit=7.0)
    wanted = GptOssExperts._apply_gate(theirs, turns)
    torch.testing.assert_close(gate(halves, "swigluoai", 7.0), wanted)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_against_twins(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    cases = [(activation.ACTIVATE, Call((x, kind), {})) for kind in SIMPLE]
    cases += [(activation.GATE, Call((x, kind, limit), {})) for kind in KINDS for limit in (0, 7.0)]
    for kernel, made in cases:
        with poisoned():
            ways = call(kernel.triton, made), call(kernel.twin, made)
        assert differs(*ways, call(kernel.twin, made, exactly=True)) == "", made.args[1:]


@pytest.mark.interpreter
def test_no_rows_are_no_work() -> None:
    assert gate(torch.empty(0, 8), "silu").shape == (0, 4)
    assert activate(torch.empty(0, 8), "silu").shape == (0, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="'swigluoai' is not one of gelu"):
        activate(torch.ones(2), "swigluoai")
    with pytest.raises(ValueError, match="'tanh' is not one of"):
        gate(torch.ones(2), "tanh")
    with pytest.raises(ValueError, match="the width is 3"):
        gate(torch.ones(3), "silu")
