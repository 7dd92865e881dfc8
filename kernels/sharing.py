"""Which rows begin with the same pages, so that attention can read these once for all."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]

# By rows of a group, how many first tokens they must share. Another launch costs 1.3 µs inside a
# graph, in which 4.3 TB/s read 1,400 tokens of 8 heads × 128 in bfloat16; below 200 tokens nobody
# has seen it pay. Derived, not yet timed.
LEAST = ((8, 200), (5, 350), (3, 700), (2, 1400))
MOST = 256  # rows that are looked at: a step's are hardly more, and the search goes as deep


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
    least = min(tokens for _, tokens in LEAST)
    own = (lengths - 1) // page  # whole pages before the one being written
    rows = np.flatnonzero((counts == 1) & (own * page >= least))
    _, begins, often = np.unique(page_table[rows, 0], return_inverse=True, return_counts=True)
    rows = rows[often[begins] > 1][:MOST]  # of strangers nothing more is asked
    found = _best(rows.tolist(), own, page_table)[1]
    groups = [(members, pages) for members, pages in found if _pays(len(members), pages * page)]
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


def _pays(members: int, tokens: int) -> bool:
    return any(members >= rows and tokens >= least for rows, least in LEAST)


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
