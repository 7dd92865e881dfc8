"""The CPU's own kernels: wrappers of the functions in `cpp/`.

Where there is no compiler, or the build fails, torch's way serves, and `enable` says why.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import memory
from kernels.backend import KERNELS
from kernels.build import compiled, here

TILE = 32  # outputs of a tile, as in products.h
GRAIN = 2 << 20  # multiplications worth another thread
READING = 16  # fewer rows than these take as long, since the weights must be read anyway
EVERYBODY = 1 << 10  # as in threads.h


def use_threads(count: int) -> None:
    """How many these kernels may take; torch's own operations are told by torch."""
    compiled().use_threads(count)


def _call(name: str, work: int, *args: Tensor | float | None) -> None:
    """A function of the library: tensors go as addresses, and how many threads it is worth last."""
    plain = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    getattr(compiled(), name)(*plain, min(EVERYBODY, 1 + work // GRAIN))


# ── products ──────────────────────────────────────────────────────────────────────────────────


KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)  # of products.h
PLAIN = dict(zip(KINDS[:3], ("linear_f32", "linear_bf16", "linear_f16")))


class Packed(NamedTuple):
    """A weight as the CPU likes to read it: tiles of 32 outputs, each read once and in order."""

    values: Tensor  # [tiles, in, 32] floats; int8: [tiles, in / 4, 32, 4]; int4: …/ 8
    out: int
    inner: int
    scales: Tensor | None = None  # float32: int8 [out]; int4 [tiles, groups, 32]
    sums: Tensor | None = None  # [out] int32: of each output's int8 values
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.inner

    @property
    def kind(self) -> int:
        return KINDS.index(self.values.dtype)


def pack(weight: Tensor, scales: Tensor | None = None, own: bool = False) -> Packed:
    """weight [out, in] of floats in 32 or 16 bits, or int8 with scales [out]; or two to a byte, as
    `kernels.linear` has them, with scales [out, groups]. `own`: may be overwritten"""
    if weight.dtype == torch.uint8 and scales is not None:
        return _pack_int4(weight, scales, own)
    (out, inner), together = weight.shape, 1 if scales is None else 4
    if inner % together:
        weight = F.pad(weight, (0, -inner % together))
    weight, units = weight.contiguous(), weight.shape[1] // together
    shape = -(-out // TILE), units, TILE, together
    tiled = weight if own and not out % TILE else memory.empty(shape, weight.dtype, "cpu")
    sums = None if scales is None else torch.empty(out, dtype=torch.int32)
    name = f"pack_{weight.itemsize * together}"
    _call(name, 64 * weight.numel(), weight, tiled, sums, out, units)
    tiled = tiled.view(shape if scales is not None else shape[:3])
    return Packed(tiled, out, inner, None if scales is None else scales.float().contiguous(), sums)


def _pack_int4(weight: Tensor, scales: Tensor, own: bool) -> Packed:
    """Bytes lie as those of int8; scales as the outputs of a tile."""
    (out, inner), groups = weight.shape, scales.shape[1]
    values = pack(weight.view(torch.int8), torch.empty(0), own).values.view(torch.uint8)
    padded = F.pad(scales.float(), (0, 0, 0, -out % TILE)).view(-1, TILE, groups)
    return Packed(values, out, 2 * inner, padded.mT.contiguous(), None, groups)


def packs_int4(weight: Tensor, scales: Tensor) -> bool:
    """Whether groups [out, groups] of these bytes [out, in / 2] are of whole fours twice."""
    return has_int8() and weight.shape[1] // scales.shape[1] % 4 == 0


def unpack(weight: Packed) -> Tensor:
    """-> [out, in] float32"""
    values = weight.values.transpose(1, 2).flatten(0, 1)[: weight.out]
    if weight.scales is None:
        return values.float()
    if weight.values.dtype == torch.uint8:
        halves = values.unflatten(1, (weight.groups, -1)).flatten(2)
        scales = weight.scales.transpose(1, 2).flatten(0, 1)[: weight.out]
        runs = torch.cat([halves & 15, halves >> 4], -1).float() - 8
        return (runs * scales[..., None]).flatten(1)
    return values.flatten(1)[:, : weight.inner].float() * weight.scales[:, None]


def lookup(weight: Packed, rows: Tensor) -> Tensor:
    """Some rows [n] of a weight of floats or int8 -> [n, in] float32"""
    count, scales = rows.shape[0], weight.scales
    found = torch.empty(count, weight.inner)
    where = weight.values.data_ptr(), scales if scales is None else scales.data_ptr()
    sizes = count, weight.inner, weight.kind
    compiled().lookup(*where, rows.data_ptr(), found.data_ptr(), *sizes)
    return found


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] float32 -> [..., out]. A row's result is the same in any company."""
    shape = (*x.shape[:-1], weight.out)
    x = x.reshape(-1, weight.inner).contiguous()
    rows = x.shape[0]
    y = torch.empty(rows, weight.out)
    three = rows, weight.inner, weight.out
    work = max(rows, READING) * weight.inner * weight.out
    if weight.values.dtype == torch.uint8:
        rounded = torch.empty(rows, weight.inner + 4 * weight.groups, dtype=torch.int8)
        rest = bias, y, rounded, torch.empty(rows)
        sizes = rows, weight.inner, weight.groups, weight.out
        _call("linear_int4", work, x, weight.values, weight.scales, *rest, *sizes)
    elif weight.scales is not None:
        rounded = torch.empty(rows, -(-weight.inner // 4) * 4, dtype=torch.uint8)
        row_scales = torch.empty(rows)
        tables = weight.values, weight.scales, weight.sums
        _call("linear_int8", work, x, *tables, bias, y, rounded, row_scales, *three)
    else:
        _call(PLAIN[weight.values.dtype], work, x, weight.values, bias, y, *three)
    return y.view(shape)


def has_int8() -> bool:
    """Whether this processor multiplies bytes four at a time (AVX-512 VNNI)."""
    return here() and bool(compiled().has_int8())


# ── attention ─────────────────────────────────────────────────────────────────────────────────


def attention(
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
    **_: Any,
) -> Tensor:
    """As `kernels.attention`, of pages of float32; or of bfloat16, in which it multiplies then."""
    (heads, dim), (kv_heads, page) = query.shape[1:], keys.shape[1:3]
    out = torch.empty(query.shape)
    table = page_table.contiguous()
    where = starts, lengths, table
    sizes = len(lengths), table.shape[1], heads, kv_heads, dim, page, *keys.stride()[2:]
    work = 16 * int(lengths.max()) * query.numel()
    _call(
        "attention_f32",
        work,
        *(query.contiguous(), keys, values, *where, sinks, slopes, out, *sizes),
        *(window, keys.itemsize, scale, softcap),
    )
    return out


def store(
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
    **_: Any,
) -> Tensor:
    """As `kernels.pages.store`, into pages of float32 or bfloat16."""
    tokens, heads, dim = query.shape
    out = torch.empty(tokens, heads, dim)
    steps = query.stride(0), key.stride(0), value.stride(0)
    at = None if at is None else at.long()
    pairs = 0 if table is None else table.shape[1] // 2
    _call(
        "store_f32",
        query.numel() * 64,
        *(query, key, value, keys, values, slots, table, at, query_norm, key_norm, out, tokens),
        *(*steps, heads, keys.shape[1], dim, keys.shape[2], *keys.stride()[2:]),
        *(keys.itemsize, pairs, eps, int(interleaved)),
    )
    return out


# ── norms and gates ───────────────────────────────────────────────────────────────────────────


def norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """-> the norm of x + added, and x + added"""
    x = x.contiguous()
    y, total = torch.empty_like(x), x if added is None else torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    _call("norm_f32", x.numel() * 64, x, added, weight, bias, y, total, rows, width, eps, int(rms))
    return y, total


def gate(x: Tensor, kind: str) -> Tensor:
    """silu and gelu_tanh: act(gate) · up of x [..., gate | up]"""
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], width)
    _call(f"{kind}_gate_f32", x.numel() * 64, x, y, x.numel() // (2 * width), width)
    return y


def activate(x: Tensor, kind: str) -> Tensor:
    """silu and gelu_tanh"""
    x = x.contiguous()
    y = torch.empty_like(x)
    _call(f"{kind}_f32", x.numel() * 64, x, y, x.numel())
    return y


def best(logits: Tensor, rows: Tensor, *_: Tensor) -> Tensor:
    """The id of the largest of some rows, as `sample` has it for temperature 0."""
    found, logits = torch.empty(len(rows), dtype=torch.int64), logits.contiguous()
    width = logits.shape[1]
    _call("best_f32", len(rows) * width * 16, logits, rows, found, len(rows), width)
    return found


def draw(logits: Tensor, rows: Tensor, bits: Tensor, temperature: Tensor) -> Tensor:
    """One id from each of some rows, as `sample` has it with a temperature alone."""
    found, logits = torch.empty(len(rows), dtype=torch.int64), logits.contiguous()
    inverse, sizes = 1 / temperature[rows], (len(rows), logits.shape[1])
    _call("draw_f32", 64 * sizes[0] * sizes[1], logits, rows, inverse, bits[rows], found, *sizes)
    return found


def log_softmax(logits: Tensor) -> Tensor:
    """float32 [n, width]; a row with a NaN has no other scores."""
    logits = logits.contiguous()
    found, (rows, width) = torch.empty_like(logits), logits.shape
    _call("log_softmax_f32", 64 * rows * width, logits, found, rows, width)
    return found


def top(
    logits: Tensor, k: int, chosen: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.topk`, of float32; a row with a NaN has no other scores."""
    rows, width = logits.shape
    logits = logits.contiguous()
    best, at = torch.empty(rows, k), torch.empty(rows)
    ids, rank = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    sizes = rows, width, k, int(normalise)
    _call("top_f32", 64 * rows * width, logits, chosen, best, ids, at, rank, *sizes)
    return best, ids, at, rank


# ── which kernels run this way ────────────────────────────────────────────────────────────────


def _attention_way(*args: Tensor, **how: Any) -> Tensor:
    query, keys = args[:2]
    small = keys.shape[3] <= 256 and query.shape[1] // keys.shape[1] <= 128  # MOST and DIM
    if not _floats(query) or not small or not reads_pages(keys):
        return KERNELS["attention"].twin(*args, **how)
    return attention(*args, **how)


def _store_way(*args: Tensor, **how: Any) -> Tensor:
    together = all(part.stride(-1) == 1 and part.stride(1) == part.shape[2] for part in args[:3])
    if not _floats(*args[:3]) or not together or args[0].shape[2] > 256 or not reads_pages(args[3]):
        return KERNELS["store"].twin(*args, **how)
    return store(*args, **how)


def reads_pages(keys: Tensor) -> bool:
    """Whether C++ reads such pages: float32 as it lies, bfloat16 in whole registers."""
    across = keys.stride(2) == 1 and keys.shape[2] % 16 == 0 and keys.shape[3] % 16 == 0
    return keys.dtype == torch.float32 or (keys.dtype == torch.bfloat16 and across)


def _norm_way(name: str, *args: Any) -> Any:
    *inputs, eps = args if name.endswith("layer_norm") else args[:-1]
    *streams, weight, bias = inputs if name.endswith("layer_norm") else (*inputs, None)
    if not _floats(*streams) or weight is None or not _floats(weight):
        return KERNELS[name].twin(*args)
    added = streams[1].contiguous() if len(streams) > 1 else None
    found = norm(streams[0], added, weight, bias, eps, rms=name.endswith("rms_norm"))
    return found[0] if added is None else found


def _gate_way(x: Tensor, kind: str, limit: float = 0.0) -> Tensor:
    if not _floats(x) or kind not in ("silu", "gelu_tanh"):
        return KERNELS["gate"].twin(x, kind, limit)
    return gate(x, kind)


def _activate_way(x: Tensor, kind: str) -> Tensor:
    if not _floats(x) or kind not in ("silu", "gelu_tanh"):
        return KERNELS["activate"].twin(x, kind)
    return activate(x, kind)


def _floats(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
WAYS: dict[str, Any] = {name: partial(_norm_way, name) for name in NORMS}
WAYS |= {"attention": _attention_way, "store": _store_way}
WAYS |= {"gate": _gate_way, "activate": _activate_way}


enabled = False


def enable() -> None:
    """From now on the kernels defined so far run natively on a CPU. Raises NotHere."""
    global enabled
    compiled()
    enabled = True
    for name, way in WAYS.items():
        if name in KERNELS:
            KERNELS[name].native = way
