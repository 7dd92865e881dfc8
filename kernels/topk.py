"""Log-softmax, the k best of it, and where one given id stands.

logprob[v] = logit[v] − log Σ exp(logit)
rank       = 1 + how many log-probabilities are strictly greater than the chosen one

Order is by log-probability as rounded to float32, and of equals the smaller id comes first. The
sum of a row never depends on other rows, or near-equal beams would change places with the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Top = tuple[Tensor, Tensor, Tensor, Tensor]
Way = Callable[[Tensor, int, Tensor | None, bool], Top]


def order_keys(scores: Tensor) -> Tensor:
    """[m, n] float32 -> int64 that sort as (score, then smaller id): all of a row differ."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes −0 equal 0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return (rising << 32) + (0xFFFFFFFF - ids)


def top_logprobs_reference(
    logits: Tensor, k: int, chosen: Tensor | None = None, normalise: bool = True
) -> Top:
    scores = logits.log_softmax(-1) if normalise else logits
    ids = order_keys(scores).topk(k, -1).indices
    return _with_chosen(scores, scores.gather(1, ids), ids, chosen)


def top_logprobs_native(
    logits: Tensor, k: int, chosen: Tensor | None = None, normalise: bool = True
) -> Top:
    """The same on a CPU: keys are made for those rows only where equals straddle the k-th place."""
    scores = logits.log_softmax(-1) if normalise else logits
    values, ids = scores.topk(min(k + 1, scores.shape[1]), -1)
    tied = values[:, k - 1 : k] == values[:, k:]  # [m, 1], or [m, 0] where all or none are wanted
    ids = ids[:, :k]
    if tied.any():
        rows = tied.any(-1)
        ids[rows] = order_keys(scores[rows]).topk(k, -1).indices
    ids = ids.sort(-1).values
    by_score = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return _with_chosen(scores, by_score.values, ids.gather(1, by_score.indices), chosen)


def _with_chosen(scores: Tensor, values: Tensor, ids: Tensor, chosen: Tensor | None) -> Top:
    at = ids[:, :1] if chosen is None else chosen[:, None]
    logprob = scores.gather(1, at)
    return values, ids, logprob[:, 0], 1 + (scores > logprob).sum(-1)


def top_logprobs(
    logits: Tensor, k: int, chosen: Tensor | None = None, *, normalise: bool = True
) -> Top:
    """logits [m, vocabulary] float32, chosen [m] int64 (None: the best)
    -> values [m, k] falling, ids [m, k] int64, the chosen's log-probability [m] and rank [m] int64

    normalise=False takes `logits` for log-probabilities as they are (beams, after penalties).
    """
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}: a vocabulary of {logits.shape[1]} has 0 to as many best")
    if chosen is None and k == 0:
        raise ValueError("k is 0 and nothing is chosen: there is nothing to find")
    return top_logprobs_native(logits, k, chosen, normalise)
