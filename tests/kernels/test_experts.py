"""The expert product against a loop over tokens and against transformers' Mixtral.

transformers is imported where it is needed: the interpreter's process loads this page as well.
"""

import pytest
import torch
from torch import Tensor

from kernels import experts as page
from kernels.activation import gate_reference
from kernels.backend import Call, call, differs
from kernels.experts import experts
from tests.kernels.poison import poisoned


def made(
    tokens: int, per_token: int, count: int, hidden: int, ff: int, biased: bool, seed: int = 0
) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    chosen = torch.rand(tokens, count).topk(per_token).indices
    probabilities = torch.rand(tokens, per_token)
    up = torch.randn(count, 2 * ff, hidden) / hidden**0.5
    down = torch.randn(count, hidden, ff) / ff**0.5
    found = (torch.randn(tokens, hidden), chosen, probabilities, up, down)
    return (*found, torch.randn(count, 2 * ff), torch.randn(count, hidden)) if biased else found


SLOW = pytest.mark.slow
CASES = [(1, 1, 1, 8, 4, True), (7, 2, 4, 32, 20, True), (21, 3, 10, 24, 16, False)]


@pytest.mark.parametrize("case", CASES)
def test_the_twin_against_a_loop_over_tokens(case: tuple[int, int, int, int, int, bool]) -> None:
    x, chosen, probabilities, up, down, *biases = (
        t.double() if t.is_floating_point() else t for t in made(*case)
    )
    wanted = torch.zeros_like(x)
    for t in range(len(x)):
        for j, e in enumerate(chosen[t].tolist()):
            inner = up[e] @ x[t] + (biases[0][e] if biases else 0)
            outer = down[e] @ gate_reference(inner, "silu") + (biases[1][e] if biases else 0)
            wanted[t] += probabilities[t, j] * outer
    got = page.EXPERTS.twin(*made(*case)).double()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_twin_is_mixtral() -> None:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=32, intermediate_size=20, num_local_experts=4)
    config._experts_implementation = "eager"
    theirs = MixtralExperts(config)
    x, chosen, probabilities, up, down = made(7, 2, 4, 32, 20, False)
    theirs.load_state_dict({"gate_up_proj": up, "down_proj": down})
    with torch.no_grad():
        wanted = theirs(x, chosen, probabilities)
    torch.testing.assert_close(experts(x, chosen, probabilities, up, down), wanted)


@pytest.mark.parametrize("kind", ["silu", "swigluoai"])
def test_gradients_flow(kind: str) -> None:
    x, chosen, probabilities, *rest = made(5, 2, 4, 8, 4, True)
    x.requires_grad_()
    up, down, up_bias, down_bias = rest
    experts(x, chosen, probabilities, up, down, up_bias, down_bias, kind, 7.0).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amin() > 0


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, pytest.param((70, 2, 2, 48, 24, True), marks=SLOW)])
def test_the_kernel_against_its_twin(
    case: tuple[int, int, int, int, int, bool], dtype: torch.dtype
) -> None:
    args = tuple(t.to(dtype) if t.is_floating_point() else t for t in made(*case))
    kind = {"kind": "swigluoai", "limit": 1.0} if case[-1] else {"kind": "silu"}
    trial = Call(args, kind)
    with poisoned():
        got = call(page.EXPERTS.triton, trial)
    ways = got, call(page.EXPERTS.twin, trial)
    assert differs(*ways, call(page.EXPERTS.twin, trial, exactly=True)) == ""


@pytest.mark.interpreter
def test_every_token_may_choose_one_expert_and_rows_do_not_mix() -> None:
    x, _, probabilities, up, down = made(40, 2, 6, 16, 8, False)
    chosen = torch.tensor([[5, 2]]).expand(40, 2)
    with poisoned():
        together = experts(x, chosen, probabilities, up, down)
    wanted = page.experts_reference(x, chosen, probabilities, up, down)
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-5)
    assert experts(x[:0], chosen[:0], probabilities[:0], up, down).shape == (0, 16)


def test_what_does_not_fit_is_refused() -> None:
    x, chosen, probabilities, up, down = made(3, 2, 4, 16, 8, False)
    with pytest.raises(ValueError, match="up gives 16 channels, down wants 2 · 7"):
        experts(x, chosen, probabilities, up, down[..., :7])
    with pytest.raises(ValueError, match="x has 15 channels and the experts take 16"):
        experts(x[:, :15], chosen, probabilities, up, down)
