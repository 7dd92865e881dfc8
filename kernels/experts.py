"""The mixture-of-experts product: every token visits its k chosen experts.

y[t] = Σ_j probabilities[t, j] · down_e(gate(up_e(x[t]))),  e = chosen[t, j]

The sum over j runs in the order of choice and in float32, so that a token's result does not
depend on which other tokens share its experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import gate


def experts_reference(
    x: Tensor,
    chosen: Tensor,
    probabilities: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    limit: float = 0.0,
) -> Tensor:
    """One product per expert that is used, over the tokens that use it."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(up)).tolist()
    parts = []
    for expert, mine in enumerate(torch.split(order, counts)):
        if len(mine):
            bias = None if up_bias is None else up_bias[expert]
            inner = gate(F.linear(x[mine // chosen.shape[1]], up[expert], bias), kind, limit)
            bias = None if down_bias is None else down_bias[expert]
            parts.append(F.linear(inner, down[expert], bias))
    visits = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1)
    return (visits.float() * probabilities.float()[..., None]).sum(1).to(x.dtype)


def experts(
    x: Tensor,
    chosen: Tensor,
    probabilities: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    limit: float = 0.0,
) -> Tensor:
    """x [n, hidden], chosen [n, k] int64, probabilities [n, k], up [experts, 2 · ff, hidden],
    down [experts, hidden, ff], biases [experts, 2 · ff] and [experts, hidden] -> [n, hidden]"""
    if up.shape[1] != 2 * down.shape[2]:
        raise ValueError(f"up gives {up.shape[1]} channels, down wants 2 · {down.shape[2]}")
    if len(x) == 0:
        return x.clone()
    return experts_reference(x, chosen, probabilities, up, down, up_bias, down_bias, kind, limit)
