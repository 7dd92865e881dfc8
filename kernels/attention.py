"""Causal attention of a batch's rows over keys and values that lie in pages.

For query i of a row with `count` queries and `length` tokens of context, at position
p = length − count + i, and each key position j ≤ p (and j > p − window, if there is a window):

    logit[j] = cap(scale · q·k[j]) + slope · (j − p)        cap(x) = softcap · tanh(x / softcap)
    out      = Σ exp(logit[j]) · v[j] / (exp(sink) + Σ exp(logit[j]))

Heads are grouped: query head h reads key/value head h // (heads / kv_heads). A row of length 0
is padding, and its output is 0. int8 and fp8 pages come with one scale a token and head.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_triton import attention_triton
from kernels.backend import Call, Kernel, Probe
from kernels.sharing import Shared


def attention(
    query: Tensor,  # [tokens, heads, dim]
    keys: Tensor,  # [pages, kv_heads, page, dim]
    values: Tensor,
    *,
    starts: Tensor,  # [rows + 1] i32 where each row's queries begin
    lengths: Tensor,  # [rows] i32 context, the queries' own tokens included
    page_table: Tensor,  # [rows, width] i32
    scale: float,
    longest_query: int,  # bounds that the host knows, so that no launch waits for the device
    longest_context: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,  # [heads]
    slopes: Tensor | None = None,  # [heads] ALiBi
    key_scales: Tensor | None = None,  # [pages, kv_heads, page] f32, with int8 and fp8 pages
    value_scales: Tensor | None = None,
    shared: Shared | None = None,  # a hint that saves reads and changes no result
) -> Tensor:
    """→ [tokens, heads, dim]"""
    _check(query, keys, values, page_table, key_scales, value_scales)
    found: Tensor = _ATTENTION(
        query,
        keys,
        values,
        starts=starts,
        lengths=lengths,
        page_table=page_table,
        scale=scale,
        longest_query=longest_query,
        longest_context=longest_context,
        window=window,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
        key_scales=key_scales,
        value_scales=value_scales,
        shared=shared,
    )
    return found


def shares_reads(device: torch.device) -> bool:
    """Whether `shared` saves anything there: it is not worth finding for ways that ignore it."""
    return _ATTENTION.choose(device).way == "triton"


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    heads, kv_heads, dim = query.shape[1], keys.shape[1], query.shape[2]
    if heads % kv_heads or keys.shape[3] != dim or keys.shape != values.shape:
        raise ValueError(
            f"{heads} query heads of {dim} cannot read keys {list(keys.shape)} and values "
            f"{list(values.shape)}: expected [pages, a divisor of {heads}, page, {dim}] twice"
        )
    across = keys.device.type == "cpu" and keys.mT.is_contiguous()  # as the CPU likes to read them
    if not ((keys.is_contiguous() or across) and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: give one layer's pages as they lie")
    if table.dtype != torch.int32 or table.stride(1) != 1:
        raise ValueError(f"page_table is {table.dtype}: expected rows of int32")
    quantised = keys.dtype in (torch.int8, torch.float8_e4m3fn)
    if quantised != (key_scales is not None) or quantised != (value_scales is not None):
        raise ValueError(
            f"pages of {keys.dtype}: scales belong to int8 and fp8 pages, and only there"
        )


def attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The twin: gathers the pages of all rows of one shape at once, then `_attend`."""
    out = torch.zeros_like(query)
    page = keys.shape[2]
    contexts = lengths.tolist()
    for rows, count, pages in _alike(starts.tolist(), [-(-n // page) for n in contexts]):
        index = torch.tensor(rows, device=query.device)
        at = starts[index].long()[:, None] + torch.arange(count, device=query.device)
        table = page_table[index, :pages].long()
        key = _gather(keys, table, key_scales, query.dtype)
        value = _gather(values, table, value_scales, query.dtype)
        ends = lengths[index].long()
        # What lies after the end may be anything, also inf and nan, which 0 · v would spread.
        unwritten = torch.arange(key.shape[2], device=query.device) >= ends[:, None]
        value = value.masked_fill(unwritten[:, None, :, None], 0)
        out[at] = _attend(query[at], key, value, ends, scale, window, softcap, sinks, slopes)
    return out


def dense_attention(
    query: Tensor,  # [tokens, heads, dim]
    key: Tensor,  # [tokens, kv_heads, dim]
    value: Tensor,
    *,
    starts: Tensor,  # [rows + 1]
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """The same over the rows' own tokens, without pages; differentiable. → [tokens, heads, dim]"""
    begins = starts.tolist()
    counts = [end - begin for begin, end in pairwise(begins)]
    pieces = [x.split_with_sizes(counts) for x in (query, key, value)]
    plain = not softcap and sinks is None and slopes is None
    found: dict[int, Tensor] = {}
    for rows, count, _ in _alike(begins, [0] * len(counts), padding=False):
        # Split and stack, since the gradient of indexing is slow.
        q, k, v = (torch.stack([part[row] for row in rows]) for part in pieces)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [rows, kv_heads, count, dim]
        if plain:
            q, seen = q.transpose(1, 2), None
            if window:
                everything = torch.ones(count, count, dtype=torch.bool, device=query.device)
                seen = everything.tril().triu(1 - window)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True
            ).transpose(1, 2)
        else:
            ends = torch.full((len(rows),), count, device=query.device)
            mixed = _attend(q, k, v, ends, scale, window, softcap, sinks, slopes)
        found |= zip(rows, mixed.unbind(0))
    return torch.cat([found[row] for row in sorted(found)]) if found else torch.zeros_like(query)


def _alike(
    begins: list[int], pages: list[int], padding: bool = True
) -> Iterator[tuple[list[int], int, int]]:
    """Rows of one query count and about as many pages, which are cheap to compute together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, needed in enumerate(pages):
        count = begins[row + 1] - begins[row]
        if count and (needed or not padding):
            groups.setdefault((count, -(-needed // 8)), []).append(row)
    for (count, _), rows in groups.items():
        yield rows, count, max(pages[row] for row in rows)


def _gather(pages: Tensor, table: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[pages, kv_heads, page, dim] by table [rows, n] → [rows, kv_heads, n · page, dim]"""
    _, heads, page, dim = pages.shape
    index = table[:, None] * heads + torch.arange(heads, device=table.device)[:, None]
    shape = (table.shape[0], heads, table.shape[1] * page)
    taken = pages.flatten(0, 1).index_select(0, index.flatten()).view(*shape, dim)
    if scales is None:
        return taken.to(dtype)
    factor = scales.flatten(0, 1).index_select(0, index.flatten()).view(*shape, 1)
    return (taken.float() * factor).to(dtype)


def _attend(
    query: Tensor,  # [rows, count, heads, dim]
    key: Tensor,  # [rows, kv_heads, context, dim]
    value: Tensor,
    ends: Tensor,  # [rows]
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """The formula at the top of this page. → [rows, count, heads, dim]"""
    rows, count, heads, dim = query.shape
    kv_heads, context = key.shape[1:3]
    group = heads // kv_heads
    exact = torch.promote_types(query.dtype, torch.float32)
    packed = query.view(rows, count, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    logits = packed.reshape(rows, kv_heads, group * count, dim) @ key.mT
    logits = logits.view(rows, kv_heads, group, count, context).to(exact) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    at = ends[:, None] - count + torch.arange(count, device=query.device)  # [rows, count]
    distance = torch.arange(context, device=query.device) - at[..., None]  # [rows, count, context]
    if slopes is not None:
        logits = logits + slopes.to(exact).view(kv_heads, group, 1, 1) * distance[:, None, None]
    hidden = distance > 0
    if window:
        hidden = hidden | (distance <= -window)
    logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(exact).view(1, kv_heads, group, 1, 1).expand(rows, -1, -1, count, 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(dim=-1)[..., :context].to(query.dtype)
    mixed = weights.view(rows, kv_heads, group * count, context) @ value
    return mixed.view(rows, kv_heads, group, count, dim).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _trial(probe: Probe) -> Iterator[Call]:
    """Rows of many shapes in one batch: decode, verification, prefill, padding."""
    counts, lengths = [1, 3, 1, 40, 1, 0, 1], [1, 200, 300, 90, 300, 0, 0]
    page = probe.page
    width = -(-max(lengths) // page)
    table = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(1))
    shape = (len(table), probe.kv_heads, page, probe.head_dim)
    keys, values = probe.random(*shape, seed=2), probe.random(*shape, seed=3)
    scales: dict[str, Tensor | None] = {"key_scales": None, "value_scales": None}
    if probe.page_dtype in (torch.int8, torch.float8_e4m3fn):
        keys, values = ((p * 30).to(probe.page_dtype) for p in (keys, values))
        scales = {name: probe.random(*shape[:3]).float().abs() / 30 for name in scales}
    common = 64 // page * page or page
    table.view(-1, width)[4, : common // page] = table.view(-1, width)[2, : common // page]
    for some in (slice(3), slice(None)):  # the second has long rows too
        starts = torch.tensor([0, *counts[some]]).cumsum(0)
        query = probe.random(int(starts[-1]), probe.heads, probe.head_dim, seed=4)
        arguments: dict[str, Any] = {
            "starts": starts.int().to(probe.device),
            "lengths": torch.tensor(lengths[some], dtype=torch.int32, device=probe.device),
            "page_table": table.view(-1, width)[some].int().contiguous().to(probe.device),
            "scale": probe.head_dim**-0.5,
            "longest_query": max(counts[some]),
            "longest_context": max(lengths[some]),
            "window": probe.window,
            "softcap": probe.softcap,
            "sinks": probe.random(probe.heads) if probe.sinks else None,
            "slopes": probe.random(probe.heads).float().abs() if probe.slopes else None,
        }
        yield Call((query, keys, values), arguments | scales)
    numbers = ([2, 4], [0, 2], [common], [0, 0, common, 0, common, 0, 0])
    arguments["shared"] = Shared(*(torch.tensor(n).int().to(probe.device) for n in numbers))
    yield Call((query, keys, values), arguments | scales)


_ATTENTION = Kernel("attention", attention_reference, attention_triton, _trial)
