"""Causal attention of a batch's rows over keys and values that lie in pages.

For query i of a row with `count` queries and `length` tokens of context, at position
p = length − count + i, and each key position j ≤ p (and j > p − window, if there is a window):

    logit[j] = cap(scale · q·k[j]) + slope · (j − p)        cap(x) = softcap · tanh(x / softcap)
    out      = Σ exp(logit[j]) · v[j] / (exp(sink) + Σ exp(logit[j]))

Heads are grouped: query head h reads key/value head h // (heads / kv_heads). A row of length 0
is padding, and its output is 0. int8 and fp8 pages come with one scale a token and head.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shared(NamedTuple):
    """Rows that read the same first pages: members of group g are rows[starts[g]:starts[g+1]]."""

    rows: Tensor  # [members] i32
    starts: Tensor  # [groups + 1] i32
    tokens: Tensor  # [groups] i32, how many first tokens the members share, whole pages


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
    return attention_reference(
        query,
        keys,
        values,
        starts=starts,
        lengths=lengths,
        page_table=page_table,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
        key_scales=key_scales,
        value_scales=value_scales,
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
    plain = not (window or softcap) and sinks is None and slopes is None
    out = []
    order: list[int] = []
    for rows, count, _ in _alike(begins, [0] * (len(begins) - 1), padding=False):
        at = torch.tensor([begins[r] for r in rows], device=query.device)[:, None]
        at = at + torch.arange(count, device=query.device)  # [rows, count]
        q, k, v = query[at], key[at].transpose(1, 2), value[at].transpose(1, 2)
        if plain:
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True
            ).transpose(1, 2)
        else:
            ends = torch.full((len(rows),), count, device=query.device)
            mixed = _attend(q, k, v, ends, scale, window, softcap, sinks, slopes)
        out.append(mixed.flatten(0, 1))
        order.extend(rows)
    if order == sorted(order):
        return torch.cat(out) if len(out) != 1 else out[0]
    sizes = [begins[r + 1] - begins[r] for r in order]
    pieces = dict(zip(order, torch.split(torch.cat(out), sizes), strict=True))
    return torch.cat([pieces[r] for r in sorted(order)])


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
        logits = logits + slopes.view(kv_heads, group, 1, 1) * distance[:, None, None]
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
