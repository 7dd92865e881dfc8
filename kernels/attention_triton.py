"""Attention over pages in Triton; `attention.py` says what it computes, this page what is launched.

Short rows (decode, draft verification) go one way, long ones (prefill) another, and what several
rows share is read before both: see `attention_short.py` and `attention_long.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention_long import _long
from kernels.attention_short import _shared, _short
from kernels.attention_tile import LEAST_PART, LOG2E, MOST_PARTS
from kernels.backend import counters, describe, launch
from kernels.config import Key, configured, runs
from kernels.sharing import Shared


class Config(NamedTuple):
    rows: int  # M side of the tile, at least: it grows with queries and group
    block: int  # keys a step
    warps: int
    stages: int  # steps in flight


# By what runs, the head's padded width and the bytes of a number in pages; "tight" where slopes, or
# a group that is no power of two, take the registers that were left. Not yet chosen by time.
CONFIGS: dict[Key, Config] = {
    ("short", 64, 2): Config(16, 64, 4, 3),
    ("short", 128, 2): Config(16, 64, 4, 3),
    ("short", 256, 2): Config(16, 32, 4, 3),
    ("short", 64, 1): Config(16, 64, 4, 3),
    ("short", 128, 1): Config(16, 64, 4, 3),
    ("short", 256, 1): Config(16, 32, 4, 3),
    ("long", 64, 2): Config(128, 64, 8, 3),
    ("long", 128, 2): Config(128, 32, 8, 3),
    ("long", 256, 2): Config(64, 32, 8, 2),
    ("long", 64, 1): Config(128, 64, 8, 3),
    ("long", 128, 1): Config(128, 32, 8, 3),
    ("long", 256, 1): Config(64, 32, 8, 2),
    ("shared", 64, 2): Config(64, 64, 4, 3),
    ("shared", 128, 2): Config(64, 32, 4, 3),
    ("shared", 256, 2): Config(64, 32, 8, 2),
    ("shared", 64, 1): Config(64, 64, 8, 3),
    ("shared", 128, 1): Config(64, 32, 4, 3),
    ("shared", 256, 1): Config(64, 32, 8, 2),
    # wgmma keeps K and V out of registers, so sm_90 takes longer steps.
    (90, "long", 128, 2): Config(128, 64, 8, 3),
    (90, "shared", 128, 2): Config(64, 64, 4, 3),
    (120, "shared", 64, 2): Config(64, 32, 4, 3),
    (80, "long", 128, 2, "tight"): Config(64, 32, 8, 3),
    ("exact",): Config(16, 16, 4, 2),  # float32, without tensor cores
}

MOST_ROWS_SHORT = 32  # of queries × group; more are better off in `_long`


def configure(where: torch.device, kind: str, dim: int, bytes_: int, tight: bool) -> Config:
    if bytes_ == 4:
        return configured(CONFIGS, where, "exact")
    key = kind, max(64, _power(dim)), bytes_
    own = CONFIGS.get((describe(where).arch, *key, "tight")) if tight else None
    return own or configured(CONFIGS, where, *key)


def attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    scale: float,
    longest_query: int,
    longest_context: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """As `attention`: one launch for short rows, one for long and one for shared pages, if any."""
    _, heads, dim = query.shape
    kv_heads, page = keys.shape[1:3]
    device, rows, group = describe(query.device), lengths.shape[0], heads // kv_heads
    if keys.dtype == torch.float8_e4m3fn and device.arch < 89:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    if query.stride()[1:] != (dim, 1):
        query = query.contiguous()
    tile = _tile_of_short(longest_query, group)
    queries = tile // group
    span = min(longest_context, window + longest_query) if window else longest_context
    most = min(MOST_PARTS.value, _ceil(span + 64, LEAST_PART.value))
    shared = None if window else shared
    slots = most if shared is None else 2 * most
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    common = {
        "query": query, "keys": keys, "values": values, "key_scales": key_scales,
        "value_scales": value_scales, "stride": query.stride(0), "starts": starts,
        "lengths": lengths, "page_table": page_table, "width": page_table.stride(0),
        "slopes": slopes, "inner": scale / softcap if softcap else scale * LOG2E.value,
        "outer": softcap * LOG2E.value, "GROUP": group, "KV_HEADS": kv_heads, "DIM": dim,
        "PADDED": max(16, _power(dim)), "PAGE": page, "SOFTCAP": softcap != 0,
    }  # fmt: skip
    parts = {
        "partial": query.new_empty(
            (rows, kv_heads, slots, queries * group, dim), dtype=torch.float32
        ),
        "levels": query.new_empty((rows, kv_heads, slots, queries * group), dtype=torch.float32),
        "slots": slots,
    }

    width = 4 if query.element_size() == 4 else keys.element_size()
    tight = slopes is not None or group != _power(group)

    def sizes_of(kind: str, least: int) -> dict[str, int]:
        if kind == "short" and least > MOST_ROWS_SHORT:
            kind = "shared"  # a wide group: tiles of this shape, and nothing to search
        config = configure(query.device, kind, dim, width, tight)
        return {"ROWS": max(config.rows, least), "BLOCK": config.block, **runs(config)}

    if shared is not None:
        sizes = sizes_of("shared", _power(group))
        blocks = _blocks(shared.rows, shared.tokens, sizes["ROWS"] // group)
        launch(
            _shared, (blocks, kv_heads, most), **common, **parts, **sizes,
            members=shared.rows, group_starts=shared.starts, group_tokens=shared.tokens,
            group_count=len(shared.tokens), SHORT=queries,
        )  # fmt: skip
    blocks = min(most, _ceil(8 * device.processors, rows * kv_heads))
    launch(
        _short, (rows, kv_heads, blocks), **common, **parts, **sizes_of("short", tile),
        out=out, arrivals=counters(query.device, rows * kv_heads), window=window or None,
        skips=None if shared is None else shared.skips, sinks=sinks,
    )  # fmt: skip
    if longest_query > queries:
        sizes = sizes_of("long", _power(group))
        blocks = _blocks(query, lengths, sizes["ROWS"] // group)
        launch(
            _long, (blocks, kv_heads), **common, **sizes, out=out, row_count=rows, sinks=sinks,
            window=window or None, SHORT=queries,
        )  # fmt: skip
    return out


def _tile_of_short(longest_query: int, group: int) -> int:
    """The M side of short rows: all queries of this launch if they are few, or one a row."""
    tile = _power(longest_query * group)
    return max(16, tile if tile <= MOST_ROWS_SHORT else _power(group))


def _blocks(items: Tensor, rows: Tensor, a_block: int) -> int:
    """An upper bound of the blocks of all rows, that needs no number from the device."""
    return int(items.shape[0] // a_block + rows.shape[0])


def _power(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def _ceil(n: int, size: int) -> int:
    return -(-n // size)
