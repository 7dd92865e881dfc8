"""The best and their ranks against a full sort in Python, with many equals."""

import pytest
import torch
from torch import Tensor

from kernels import native, topk
from kernels.backend import Call, call, differs
from kernels.topk import top_logprobs
from tests.kernels.poison import poisoned

WAYS = [topk.top_logprobs_reference, topk.top_logprobs_native]


def tied_logits(rows: int, size: int) -> Tensor:
    """Quarters, so that equals are everywhere; both zeros; some masked."""
    found = (torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 8).round() / 4
    found[:, 1::5] *= 0.0
    found[:, ::7] = -torch.inf
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [5, 77, 1000])
@pytest.mark.parametrize("normalise", [True, False])
def test_order_and_ranks(
    way: topk.Way, size: int, normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "enabled", False)  # C++ sums in another order: test_native.py
    logits = tied_logits(12, size)
    chosen = torch.arange(12) % size
    scores = logits.log_softmax(-1) if normalise else logits
    for k in (0, 1, 3, size):
        values, ids, logprob, rank = way(logits, k, chosen, normalise)
        for row, mine in enumerate(scores.tolist()):
            given = logits[row].tolist()
            order = sorted(range(size), key=lambda i: (-given[i], i))[:k]
            assert ids[row].tolist() == order
            assert values[row].tolist() == [mine[i] for i in order]
            assert logprob[row] == mine[chosen[row]]
            assert rank[row] == 1 + sum(other > given[chosen[row]] for other in given)


def test_log_softmax_is_right() -> None:
    logits = torch.randn(9, 333) * 5
    exact = logits.double().log_softmax(-1)
    values, ids, _, rank = top_logprobs(logits, 333)
    torch.testing.assert_close(values.double(), exact.gather(1, ids), rtol=1e-6, atol=2e-6)
    assert rank.tolist() == [1] * 9


@pytest.mark.parametrize("size", [31, 4099, 50257])
def test_a_row_does_not_depend_on_the_batch(size: int) -> None:
    logits = torch.randn(6, size) * 3
    chosen = torch.arange(6)
    together = top_logprobs(logits, 4, chosen)
    for row in range(6):
        alone = top_logprobs(logits[row : row + 1].clone(), 4, chosen[row : row + 1])
        for one, all_ in zip(alone, together):
            assert torch.equal(one[0], all_[row])


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 5, 1000, 4096, 9001])  # less than a part, one, three
def test_the_kernel_against_its_twin(size: int) -> None:
    logits = tied_logits(3, size)
    logits[2] = torch.randn(size) * 9
    chosen = torch.tensor([0, size // 2, size - 1])
    for k, normalise in ((0, True), (1, False), (min(size, 6), True)):
        for given in (chosen, None) if k else (chosen,):
            made = Call((logits, k, given, normalise), {})
            with poisoned():
                got = call(topk.TOP_LOGPROBS.triton, made)
            ways = got, call(topk.TOP_LOGPROBS.twin, made)
            assert differs(*ways, call(topk.TOP_LOGPROBS.twin, made, exactly=True)) == ""


@pytest.mark.interpreter
def test_in_a_kernel_too_a_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(4, 5000) * 3
    together = top_logprobs(logits, 3, torch.arange(4))
    for row in range(4):
        alone = top_logprobs(logits[row : row + 1], 3, torch.tensor([row]))
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together))


def test_what_is_asked_is_checked() -> None:
    with pytest.raises(ValueError, match="k is 8"):
        top_logprobs(torch.zeros(1, 7), 8)
    with pytest.raises(ValueError, match="nothing to find"):
        top_logprobs(torch.zeros(1, 7), 0)
