"""Which rows begin with the same pages, so that attention can read these once for all."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]
LEAST = 200  # tokens; what a shorter prefix saves is less than another launch costs


class Shared(NamedTuple):
    """Groups of rows of one query each; members of group g are rows[starts[g]:starts[g + 1]]."""

    rows: Tensor  # [members] i32
    starts: Tensor  # [groups + 1] i32
    tokens: Tensor  # [groups] i32, how many first tokens the members share, whole pages; 0: unused
    skips: Tensor  # [all rows] i32, the same of each row's group; 0: the row is in none


def find_shared(counts: Ints, lengths: Ints, page_table: Ints, page: int) -> Shared | None:
    """Groups that save the most reads; None: nothing worth it. All arguments on the host.

    counts [rows] queries, lengths [rows], page_table [rows, width]. Rows of several queries and
    a row's last page, which it writes, are never shared.
    """
    own = (lengths - 1) // page  # whole pages before the one being written
    rows = [int(r) for r in np.flatnonzero((counts == 1) & (own * page >= LEAST))]
    groups = [g for g in _best(rows, own, page_table)[1] if g[1] * page >= LEAST]
    if not groups:
        return None
    skips = np.zeros(len(counts), np.int32)
    for members, pages in groups:
        skips[members] = pages * page
    edges = np.cumsum([0, *(len(members) for members, _ in groups)])
    return Shared(
        _tensor([row for members, _ in groups for row in members]),
        _tensor(edges),
        _tensor([pages * page for _, pages in groups]),
        torch.from_numpy(skips),
    )


def _best(rows: list[int], own: Ints, table: Ints) -> tuple[int, list[tuple[list[int], int]]]:
    """→ pages not read again, and the groups (rows, pages) that save them.

    They may be one group, or fall apart where they branch.
    """
    if len(rows) < 2:
        return 0, []
    least = int(own[rows].min())
    same = (table[rows, :least] == table[rows[0], :least]).all(0)
    common = least if same.all() else int(same.argmin())
    whole = (len(rows) - 1) * common
    branches: dict[int, list[int]] = {}
    for row in rows:
        if own[row] > common:
            branches.setdefault(int(table[row, common]), []).append(row)
    found = [_best(branch, own, table) for branch in branches.values()]
    apart = sum(saved for saved, _ in found)
    if whole >= apart:
        return whole, [(rows, common)] if common > 0 else []
    return apart, [group for _, groups in found for group in groups]


def _tensor(values: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)
