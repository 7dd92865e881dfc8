"""Turn queries and keys by their positions, write keys and values into pages, copy pages.

A head's first 2·pairs channels turn pair by pair, the rest pass; with angles a = position · θ:

    (x, y) → (x·cos a − y·sin a,  y·cos a + x·sin a)

Pairs are channels (i, i + pairs), or (2i, 2i + 1) if interleaved. Before that queries and keys
may be normalised, each head by itself: x · weight / sqrt(mean(x²) + eps).
int8 and fp8 pages hold x / scale, with scale = max|x| / (the type's largest), a token and head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Call, Kernel, Probe
from kernels.pages_triton import copy_pages_triton, rotate_triton, store_triton

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rotate(x: Tensor, table: Tensor, at: Tensor, interleaved: bool = False) -> Tensor:
    """x [tokens, heads, dim], table [positions, 2·pairs] (cos | sin), at [tokens] → like x"""
    _check_table(x, table, at)
    turned: Tensor = _ROTATE(x, table, at, interleaved)
    return turned


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
    quantised = keys.dtype in LARGEST
    if quantised != (key_scales is not None) or quantised != (value_scales is not None):
        raise ValueError(f"pages of {keys.dtype}: scales belong to int8 and fp8 pages, no others")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm: expected both or neither")
    if table is not None:
        _check_table(query, table, at)
    stored: Tensor = _STORE(
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
    return stored


def _check_table(x: Tensor, table: Tensor, at: Tensor | None) -> None:
    if at is None or at.shape != x.shape[:1]:
        raise ValueError(f"at must be the positions of {x.shape[0]} tokens, and is {at}")
    if table.shape[1] > x.shape[2] or not table.is_contiguous():
        raise ValueError(
            f"table {list(table.shape)}: expected [positions, at most {x.shape[2]} cos | sin]"
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


def copy_pages(cache: Tensor, copies: Tensor, scales: Tensor | None = None) -> None:
    """Copies the first `slots` tokens of page `from` to page `to`, in every layer, keys and values.

    cache [layers, 2, pages, kv_heads, page, dim], copies [n, 3]: from, to, slots; scales [layers,
    2, pages, kv_heads, page] of int8 and fp8 pages. All are read before any is written, in effect:
    no page is both written and read.
    """
    if copies.shape[0]:
        _COPY_PAGES(cache, copies, scales)


def copy_pages_reference(cache: Tensor, copies: Tensor, scales: Tensor | None = None) -> None:
    slots = torch.arange(cache.shape[4], device=cache.device)
    source, target, counts = copies.long().unbind(1)
    kept = (slots < counts[:, None])[:, None, :]  # [n, 1, page]
    cache[:, :, target] = torch.where(kept[..., None], cache[:, :, source], cache[:, :, target])
    if scales is not None:
        scales[:, :, target] = torch.where(kept, scales[:, :, source], scales[:, :, target])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    spread = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * spread * weight.to(exact.dtype)).to(x.dtype)


def _write(x: Tensor, pages: Tensor, slots: Tensor, scales: Tensor | None) -> None:
    """x [tokens, kv_heads, dim] into pages [pages, kv_heads, page, dim] at slots"""
    page, offset = slots // pages.shape[2], slots % pages.shape[2]
    if scales is not None:
        largest = LARGEST[pages.dtype]
        x = x.to(scales.dtype)
        scale = x.abs().amax(-1) / largest  # [tokens, kv_heads]
        scales[page, :, offset] = scale
        x = x / scale.clamp(min=1e-30)[..., None]
        if pages.dtype == torch.int8:
            x = x.round()
        x = x.clamp(-largest, largest)
    pages[page, :, offset] = x.to(pages.dtype)


def _trial_rotate(probe: Probe) -> Iterator[Call]:
    table, at = _angles(probe), torch.tensor([0, 3, 5], device=probe.device)
    yield Call((probe.random(3, probe.heads, probe.head_dim), table, at, probe.interleaved), {})


def _trial_store(probe: Probe) -> Iterator[Call]:
    """Four tokens of a product q | k | v, one of them padding, into pages that hold something."""
    tokens, kv_heads, dim = 4, probe.kv_heads, probe.head_dim
    whole = probe.random(tokens, probe.heads + 2 * kv_heads, dim)
    query, key, value = whole.split_with_sizes([probe.heads, kv_heads, kv_heads], 1)
    dtype = probe.page_dtype or probe.dtype
    pages = [torch.ones(3, kv_heads, probe.page, dim, device=probe.device) for _ in "kv"]
    slots = torch.tensor([0, probe.page + 1, -1, 3 * probe.page - 1], device=probe.device)
    scale = torch.ones(pages[0].shape[:3], device=probe.device) if dtype in LARGEST else None
    arguments: dict[str, Any] = {
        "table": None if probe.turned == 0 else _angles(probe),
        "at": torch.arange(tokens, device=probe.device),
        "interleaved": probe.interleaved,
        "query_norm": probe.random(dim, seed=1).float() if probe.normed else None,
        "key_norm": probe.random(dim, seed=2).float() if probe.normed else None,
        "key_scales": scale,
        "value_scales": scale,
    }
    yield Call((query, key, value, *(p.to(dtype) for p in pages), slots), arguments)


def _trial_copy(probe: Probe) -> Iterator[Call]:
    cache = probe.random(2, 2, 6, probe.kv_heads, probe.page, probe.head_dim)
    numbers = [[0, 5, probe.page], [3, 1, 1], [2, 4, 0]]
    copies = torch.tensor(numbers, dtype=torch.int32, device=probe.device)
    dtype = probe.page_dtype or probe.dtype
    scales = probe.random(*cache.shape[:-1], seed=1).float() if dtype in LARGEST else None
    yield Call((cache.to(dtype), copies, scales), {})


def _angles(probe: Probe) -> Tensor:
    pairs = (probe.head_dim if probe.turned is None else probe.turned) // 2 or 2
    angles = torch.arange(8)[:, None] / (1 + torch.arange(pairs))
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(probe.device)


_ROTATE = Kernel("rotate", rotate_reference, rotate_triton, _trial_rotate)
_STORE = Kernel("store", store_reference, store_triton, _trial_store)
_COPY_PAGES = Kernel("copy_pages", copy_pages_reference, copy_pages_triton, _trial_copy)
