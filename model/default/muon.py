"""Muon, for the matrices of the layers; embeddings and norms stay with AdamW.

Muon (K. Jordan, 2024) steps along the orthogonal matrix nearest to the momentum, so that every
direction of a weight moves equally far, also those in which gradients are small. A few rounds of
Newton and Schulz find it with products alone; matrices of one shape go together.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's: singular values to about 1 in five rounds


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """[n, rows, columns] -> the same with all singular values near 1"""
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """`parts` maps a parameter to the rows of each matrix that is fused in it."""

    def __init__(
        self, parts: dict[Tensor, tuple[int, ...]], lr: float, decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(list(parts), {"lr": lr, "decay": decay, "momentum": momentum})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                direction = self._direction(weight, group["momentum"])
                weight.mul_(1 - group["lr"] * group["decay"])
                rows = self.parts[weight]
                for part, move in zip(weight.split(rows), direction.split(rows), strict=True):
                    alike[part.shape].append((part, move))
            for shape, pairs in alike.items():
                scale = max(1, shape[0] / shape[1]) ** 0.5
                moves = orthogonal(torch.stack([move for _, move in pairs]))
                for (part, _), move in zip(pairs, moves, strict=True):
                    part.add_(move, alpha=-group["lr"] * scale)

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the average of gradients, looked at one step ahead."""
        state = self.state[weight]
        average = state.setdefault("average", torch.zeros_like(weight))
        assert weight.grad is not None
        average.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum)
