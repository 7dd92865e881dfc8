"""Rows of state on the device that few seats need: made when one asks, doubled when all are taken.

One row a seat of [vocabulary] would be 155 MB at 256 seats and 152k tokens, and most never look.
"""

import numpy as np
import torch
import torch.nn.functional as F


class Shelf:
    def __init__(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = np.full(capacity, -1)  # by seat; −1: it has none
        self.free = [0]
        self.rows = torch.zeros(1, width, dtype=dtype, device=device)  # [slots, width]

    def take(self, seat: int) -> torch.Tensor:
        """The seat's row [width], filled with zeros."""
        if self.slots[seat] < 0:
            if not self.free:
                self._grow(len(self.rows), 0)
            self.slots[seat] = self.free.pop()
        return self.rows[int(self.slots[seat])].zero_()

    @property
    def bare(self) -> bool:
        """Whether no seat has one, as is usual."""
        return len(self.free) == self.rows.shape[0]

    def drop(self, seat: int) -> None:
        if self.slots[seat] >= 0:
            self.free.append(int(self.slots[seat]))
            self.slots[seat] = -1

    def widen(self, width: int) -> None:
        """At least so wide; twice as wide as before, so that growing is rare."""
        now = self.rows.shape[1]
        if width > now:
            self._grow(0, max(width, 2 * now) - now)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Seat to seat, all read before any is written; no slot there makes none here."""
        held = [int(self.slots[seat]) for seat in sources]
        rows = self.rows[[slot for slot in held if slot >= 0]]
        for seat, slot in zip(targets, held, strict=True):
            if slot < 0:
                self.drop(seat)
            else:
                self.take(seat)
        kept = [int(self.slots[seat]) for seat, slot in zip(targets, held) if slot >= 0]
        self.rows[kept] = rows

    def _grow(self, slots: int, width: int) -> None:
        self.free.extend(range(len(self.rows), len(self.rows) + slots))
        self.rows = F.pad(self.rows, (0, width, 0, slots))
