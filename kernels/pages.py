"""Turn queries and keys by their positions, write keys and values into pages, copy pages.

A head's first 2·pairs channels turn pair by pair, the rest pass; with angles a = position · θ:

    (x, y) → (x·cos a − y·sin a,  y·cos a + x·sin a)

Pairs are channels (i, i + pairs), or (2i, 2i + 1) if interleaved. Before that queries and keys
may be normalised, each head by itself: x · weight / sqrt(mean(x²) + eps).
int8 and fp8 pages hold x / scale, with scale = max|x| / (the type's largest), a token and head.
"""

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rotate(x: Tensor, table: Tensor, at: Tensor, interleaved: bool = False) -> Tensor:
    """x [tokens, heads, dim], table [positions, 2·pairs] (cos | sin), at [tokens] → like x"""
    return rotate_reference(x, table, at, interleaved)


def rotate_reference(x: Tensor, table: Tensor, at: Tensor, interleaved: bool = False) -> Tensor:
    pairs = table.shape[1] // 2
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    exact = torch.promote_types(x.dtype, table.dtype)
    cos, sin = table[at].to(exact)[:, None].chunk(2, dim=-1)  # [tokens, 1, pairs]
    if interleaved:
        a, b = turned[..., 0::2].to(exact), turned[..., 1::2].to(exact)
        both = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.to(exact).chunk(2, dim=-1)
        both = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([both.to(x.dtype), rest], dim=-1) if rest.shape[-1] else both.to(x.dtype)


def store(
    query: Tensor,  # [tokens, heads, dim]
    key: Tensor,  # [tokens, kv_heads, dim]
    value: Tensor,
    keys: Tensor,  # [pages, kv_heads, page, dim], written
    values: Tensor,
    slots: Tensor,  # [tokens] i64: page · page_size + offset; negative: not written
    *,
    table: Tensor | None = None,  # [positions, 2·pairs]; None: nothing turns
    at: Tensor | None = None,  # [tokens] positions
    interleaved: bool = False,
    query_norm: Tensor | None = None,  # [dim]
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    key_scales: Tensor | None = None,  # [pages, kv_heads, page] f32, with int8 and fp8 pages
    value_scales: Tensor | None = None,
) -> Tensor:
    """Normalises and turns query and key, writes key and value. → the query"""
    return store_reference(
        query,
        key,
        value,
        keys,
        values,
        slots,
        table=table,
        at=at,
        interleaved=interleaved,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
        key_scales=key_scales,
        value_scales=value_scales,
    )


def store_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    *,
    table: Tensor | None = None,
    at: Tensor | None = None,
    interleaved: bool = False,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    if query_norm is not None and key_norm is not None:
        query, key = _norm(query, query_norm, eps), _norm(key, key_norm, eps)
    if table is not None and at is not None:
        query = rotate_reference(query, table, at, interleaved)
        key = rotate_reference(key, table, at, interleaved)
    if (slots < 0).any():
        kept = slots >= 0
        key, value, slots = key[kept], value[kept], slots[kept]
    with torch.no_grad():
        _write(key, keys, slots, key_scales)
        _write(value, values, slots, value_scales)
    return query


def copy_pages(cache: Tensor, copies: Tensor) -> None:
    """Copies the first `slots` tokens of page `from` to page `to`, in every layer, keys and values.

    cache [layers, 2, pages, kv_heads, page, dim], copies [n, 3]: from, to, slots. All are read
    before any is written, in effect: no page is both written and read.
    """
    copy_pages_reference(cache, copies)


def copy_pages_reference(cache: Tensor, copies: Tensor) -> None:
    slots = torch.arange(cache.shape[4], device=cache.device)
    source, target, counts = copies.long().unbind(1)
    kept = (slots < counts[:, None])[:, None, :, None]  # [n, 1, page, 1]
    cache[:, :, target] = torch.where(kept, cache[:, :, source], cache[:, :, target])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    spread = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * spread * weight.to(exact.dtype)).to(x.dtype)


def _write(x: Tensor, pages: Tensor, slots: Tensor, scales: Tensor | None) -> None:
    """x [tokens, kv_heads, dim] into pages [pages, kv_heads, page, dim] at slots"""
    page, offset = slots // pages.shape[2], slots % pages.shape[2]
    if scales is not None:
        largest = LARGEST[pages.dtype]
        scale = x.float().abs().amax(-1) / largest  # [tokens, kv_heads]
        scales[page, :, offset] = scale
        x = x.float() / scale.clamp(min=1e-30)[..., None]
        if pages.dtype == torch.int8:
            x = x.round()
        x = x.clamp(-largest, largest)
    pages[page, :, offset] = x.to(pages.dtype)
