"""What `benchmarks.kernels` measures: the shapes that matter, the work in them, and the peers.

Every case makes its inputs several times over, so that no call finds them in the cache of the
call before. A peer that is not installed, or cannot do the case, is left out by name.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.activation import activate, gate
from kernels.attention import attention
from kernels.experts import experts
from kernels.linear import linear, quantize_fp8, quantize_int4, quantize_int8
from kernels.norm import add_layer_norm, add_rms_norm
from kernels.pages import copy_pages, store
from kernels.penalties import penalise
from kernels.sampling import sample
from kernels.sharing import Shared, find_shared
from kernels.topk import top_logprobs

COLD = 180e6  # bytes of inputs to go round, three times what an H200 caches
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
Rival = Callable[[int], object]  # called with the number of the copy to work on


@dataclass
class Work:
    bytes: float  # that must be read and written
    operations: float = 0.0  # multiplications and additions
    copies: int = 1
    rivals: dict[str, Rival] = field(default_factory=dict)  # "kvist" first


@dataclass(frozen=True)
class Case:
    kernel: str
    shape: str
    make: Callable[["Bench"], Work]
    again: bool = False  # another case with other numbers: nothing new to rehearse


@dataclass(frozen=True)
class Bench:
    device: torch.device
    small: bool  # for the interpreter: every loop is run, and none for long
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def copies(self, size: float) -> int:
        return 2 if self.small else max(1, min(64, round(COLD / size)))

    def size(self, real: int, small: int) -> int:
        return small if self.small else real


# ── attention ─────────────────────────────────────────────────────────────────────────────────


class Pages(NamedTuple):
    keys: Tensor  # [pages, kv_heads, page, dim]
    values: Tensor
    scales: dict[str, Any]


def _pages(bench: Bench, count: int, dtype: torch.dtype | None = None) -> Pages:
    shape = (2, count, KV_HEADS, PAGE, DIM)
    if dtype is None:
        pages = torch.empty(shape, dtype=bench.dtype, device=bench.device).normal_()
        return Pages(pages[0], pages[1], {})
    numbers = torch.randint(-127, 128, shape, dtype=torch.int8, device=bench.device)
    pages = numbers if dtype == torch.int8 else (numbers.view(torch.uint8) & 0xBF).view(dtype)
    scales = torch.full(shape[1:-1], 0.01, device=bench.device)
    return Pages(pages[0], pages[1], {"key_scales": scales, "value_scales": scales})


def _rows(bench: Bench, rows: int, queries: int, context: int) -> dict[str, Any]:
    """`rows` rows of one shape, over pages in random order."""
    pages = rows * context // PAGE
    table = torch.randperm(pages, device=bench.device).int().view(rows, -1)
    return {
        "starts": bench.ints(range(0, rows * queries + 1, queries)),
        "lengths": bench.ints([context] * rows),
        "page_table": table,
        "scale": DIM**-0.5,
        "longest_query": queries,
        "longest_context": context,
    }


def _attention(
    rows: int, queries: int, context: int, bench: Bench, page_dtype: torch.dtype | None = None
) -> Work:
    if bench.small:
        rows, queries, context = min(rows, 3), min(queries, 48), 96
    call = _rows(bench, rows, queries, context)
    width = (page_dtype or bench.dtype).itemsize
    size = 2 * rows * context * KV_HEADS * DIM * width
    query = bench.random(rows * queries, HEADS, DIM)
    copies = bench.copies(size)
    caches = [_pages(bench, rows * context // PAGE, page_dtype) for _ in range(copies)]
    seen = queries * context - queries * (queries - 1) / 2  # of one row
    work = Work(size + 2 * query.nbytes, 4 * rows * seen * HEADS * DIM, copies)

    def ours(i: int) -> Tensor:
        keys, values, scales = caches[i]
        return attention(query, keys, values, **call, **scales)

    work.rivals["kvist"] = ours
    if page_dtype is None:
        work.rivals |= _sdpa(query, caches, rows, queries, context)
        work.rivals |= _flashinfer(query, caches, call, bench)
    return work


def _sdpa(
    query: Tensor, caches: list[Pages], rows: int, queries: int, context: int
) -> dict[str, Rival]:
    """Torch's own, over keys that lie in one piece: the pages' memory, seen as dense."""
    if queries not in (1, context):
        return {}  # torch's causal mask begins at the first key
    q = query.view(rows, queries, HEADS, DIM).transpose(1, 2)
    shape = (rows, KV_HEADS, context, DIM)

    def run(i: int, backend: SDPBackend) -> Tensor:
        k, v = caches[i].keys.view(shape), caches[i].values.view(shape)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    names = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    if query.device.type == "cpu":
        names = {"SDPA": SDPBackend.MATH}
    return {name: functools.partial(run, backend=backend) for name, backend in names.items()}


def _flashinfer(
    query: Tensor, caches: list[Pages], call: dict[str, Any], bench: Bench
) -> dict[str, Rival]:
    try:
        import flashinfer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return {}
    table = call["page_table"]
    rows, width = table.shape
    edges = bench.ints(range(0, rows * width + 1, width))
    last = bench.ints([PAGE] * rows)
    room = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)
    if call["longest_query"] == 1:
        planned = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "HND")
        sizes = (HEADS, KV_HEADS, DIM, PAGE)
        planned.plan(edges, table.flatten(), last, *sizes, q_data_type=bench.dtype)
    else:
        planned = flashinfer.BatchPrefillWithPagedKVCacheWrapper(room, "HND")
        sizes = (HEADS, KV_HEADS, DIM, PAGE)
        planned.plan(call["starts"], edges, table.flatten(), last, *sizes, causal=True)
    return {"FlashInfer": lambda i: planned.run(query, caches[i][:2])}


def _shared(groups: int, width: int, prefix: int, own: int, bench: Bench) -> Work:
    """`groups` beam groups that share a prefix, and as many tokens of each beam's own."""
    if bench.small:
        groups, width, prefix, own = 1, 8, 208, 16
    rows = groups * width
    call = _rows(bench, rows, 1, prefix + own)
    table = call["page_table"].view(groups, width, -1)
    table[:, :, : prefix // PAGE] = table[:, :1, : prefix // PAGE].clone()
    host = {name: call[name].cpu().numpy() for name in ("lengths", "page_table")}
    counts = host["lengths"] * 0 + 1
    shared = find_shared(counts, host["lengths"], host["page_table"], PAGE)
    assert shared is not None
    shared = Shared(*(part.to(bench.device) for part in shared))
    size = 2 * (groups * prefix + rows * own) * KV_HEADS * DIM * bench.dtype.itemsize
    query = bench.random(rows, HEADS, DIM)
    copies = bench.copies(size)
    caches = [_pages(bench, rows * (prefix + own) // PAGE) for _ in range(copies)]

    def run(i: int, shared: Shared | None) -> Tensor:
        return attention(query, caches[i].keys, caches[i].values, **call, shared=shared)

    rivals: dict[str, Rival] = {
        "kvist": functools.partial(run, shared=shared),
        "not shared": functools.partial(run, shared=None),
    }
    return Work(size, copies=copies, rivals=rivals)


# ── pages ─────────────────────────────────────────────────────────────────────────────────────


def _store(tokens: int, bench: Bench, page_dtype: torch.dtype | None = None) -> Work:
    tokens = bench.size(tokens, 5)
    heads = HEADS + 2 * KV_HEADS
    copies = bench.copies(tokens * heads * DIM * bench.dtype.itemsize)
    whole = [bench.random(tokens, heads, DIM) for _ in range(copies)]
    pages = _pages(bench, -(-tokens // PAGE), page_dtype)
    table = torch.randn(8192, DIM, device=bench.device)
    at = torch.arange(tokens, device=bench.device) % 8192
    turn: dict[str, Any] = {"table": table, "at": at}
    turn |= {"query_norm": bench.random(DIM), "key_norm": bench.random(DIM)}

    def run(i: int) -> Tensor:
        query, key, value = whole[i].split_with_sizes([HEADS, KV_HEADS, KV_HEADS], 1)
        return store(query, key, value, pages.keys, pages.values, at, **turn, **pages.scales)

    query, written = HEADS * bench.dtype.itemsize, 2 * KV_HEADS * pages.keys.element_size()
    size = whole[0].nbytes + tokens * DIM * (query + written + 4)
    return Work(size, copies=copies, rivals={"kvist": run})


def _copy(pages: int, bench: Bench) -> Work:
    layers, pages = bench.size(32, 2), bench.size(pages, 2)
    shape = (layers, 2, 2 * pages, KV_HEADS, PAGE, DIM)
    cache = torch.zeros(shape, dtype=bench.dtype, device=bench.device)
    order = torch.randperm(2 * pages, device=bench.device).int()
    copies = torch.stack([order[:pages], order[pages:], torch.full_like(order[:pages], PAGE)], 1)

    def torchs(_: int) -> None:
        cache[:, :, copies[:, 1].long()] = cache[:, :, copies[:, 0].long()]

    rivals: dict[str, Rival] = {"kvist": lambda _: copy_pages(cache, copies), "torch": torchs}
    return Work(cache.nbytes, rivals=rivals)


# ── the rest of a step ────────────────────────────────────────────────────────────────────────


def _norm(rows: int, bench: Bench, rms: bool = True) -> Work:
    rows, width = bench.size(rows, 3), bench.size(4096, 64)
    copies = bench.copies(4 * rows * width * 2)
    xs = [(bench.random(rows, width), bench.random(rows, width)) for _ in range(copies)]
    weight = bench.random(width)

    def torchs(i: int) -> Tensor:
        total = xs[i][0] + xs[i][1]
        if rms:
            return F.rms_norm(total, (width,), weight, 1e-5)
        return F.layer_norm(total, (width,), weight, weight, 1e-5)

    def ours(i: int) -> object:
        if rms:
            return add_rms_norm(*xs[i], weight, 1e-5)
        return add_layer_norm(*xs[i], weight, weight, 1e-5)

    rivals: dict[str, Rival] = {"kvist": ours, "torch": torchs}
    return Work(4 * xs[0][0].nbytes, copies=copies, rivals=rivals)


def _gate(rows: int, bench: Bench) -> Work:
    rows, width = bench.size(rows, 3), bench.size(14336, 64)
    x = bench.random(rows, 2 * width)

    def torchs(_: int) -> Tensor:
        first, second = x.chunk(2, -1)
        return F.silu(first) * second

    rivals: dict[str, Rival] = {"kvist": lambda _: gate(x, "silu"), "torch": torchs}
    return Work(1.5 * x.nbytes, rivals=rivals)


def _activate(rows: int, bench: Bench) -> Work:
    rows, width = bench.size(rows, 3), bench.size(16384, 64)
    x = bench.random(rows, width)
    rivals: dict[str, Rival] = {
        "kvist": lambda _: activate(x, "gelu_tanh"),
        "torch": lambda _: F.gelu(x, approximate="tanh"),
    }
    return Work(2 * x.nbytes, rivals=rivals)


def _experts(tokens: int, bench: Bench) -> Work:
    """The shape of Qwen 3 30B: 8 of 128 experts a token."""
    count, per_token = bench.size(128, 4), bench.size(8, 2)
    tokens, hidden, ff = bench.size(tokens, 3), bench.size(2048, 64), bench.size(768, 32)
    up, down = bench.random(count, 2 * ff, hidden), bench.random(count, hidden, ff)
    x, liking = bench.random(tokens, hidden), bench.random(tokens, count).float().softmax(-1)
    shares, chosen = liking.topk(per_token)
    used = len(chosen.unique())
    return Work(
        used * 3 * hidden * ff * x.element_size() + 2 * x.nbytes,
        6.0 * tokens * per_token * hidden * ff,
        rivals={"kvist": lambda _: experts(x, chosen, shares, up, down)},
    )


def _linear(rows: int, kind: str, bench: Bench, out: int = 28672, inner: int = 4096) -> Work:
    out, inner = bench.size(out, 64), bench.size(inner, inner // 8)
    formats: dict[str, Callable[[Tensor], Any]] = {
        "float": lambda w: w,
        "int8": quantize_int8,
        "fp8": quantize_fp8,
        "int4": lambda w: quantize_int4(w, inner // 128),
    }
    copies = bench.copies(out * inner / 2)  # as many as the smallest format needs
    weights = [bench.random(out, inner) for _ in range(copies)]
    made = [formats[kind](weight) for weight in weights]
    x = bench.random(rows, inner)
    parts = made[0] if isinstance(made[0], tuple) else (made[0],)
    rivals: dict[str, Rival] = {
        "kvist": lambda i: linear(x, made[i]),
        "cuBLAS": lambda i: F.linear(x, weights[i]),
    }
    work = sum(part.nbytes for part in parts) + x.nbytes + rows * out * x.element_size()
    return Work(work, 2.0 * rows * out * inner, copies, rivals)


def _sample(rows: int, bench: Bench, filters: bool = True) -> Work:
    rows, size = bench.size(rows, 2), bench.size(131072, 512)
    copies = bench.copies(rows * size * 4)
    logits = [bench.random(rows, size).float() for _ in range(copies)]
    bits = torch.randint(-(2**62), 2**62, (rows,), device=bench.device)
    # temperature, top_k, top_p, min_p, typical_p
    one = [0.8, 50.0, 0.9, 0.02, 1.0] if filters else [0.8, 0.0, 1.0, 0.0, 1.0]
    settings = torch.tensor([one], device=bench.device).repeat(rows, 1)

    def torchs(i: int) -> Tensor:
        """Less than is asked for: top-k and top-p alone, and no seed."""
        values, ids = (logits[i] / 0.8).topk(50)
        kept = values.softmax(-1)
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= 0.9, 0)
        return ids.gather(1, kept.multinomial(1))

    rivals: dict[str, Rival] = {
        "kvist": lambda i: sample(logits[i], bits, settings),
        "torch": torchs,
    }
    return Work(logits[0].nbytes, copies=copies, rivals=rivals)


def _penalise(rows: int, bench: Bench) -> Work:
    rows, size = bench.size(rows, 2), bench.size(131072, 512)
    logits, slots = bench.random(rows, size).float(), bench.ints(range(rows), torch.int64)
    counts = torch.randint(0, 3, (rows, size), dtype=torch.int32, device=bench.device)
    penalties = torch.tensor([[1.2, 0.1, 0.1]], device=bench.device).repeat(rows, 1)
    masks = torch.full((rows, size // 32), -1, dtype=torch.int32, device=bench.device)

    def ours(_: int) -> Tensor:
        return penalise(logits, counts, slots, penalties, masks, slots)

    return Work(3 * logits.nbytes + masks.nbytes, rivals={"kvist": ours})


def _beams(rows: int, bench: Bench) -> Work:
    rows, size = bench.size(rows, 2), bench.size(131072, 512)
    copies = bench.copies(rows * size * 4)
    logits = [bench.random(rows, size).float() for _ in range(copies)]
    rivals: dict[str, Rival] = {
        "kvist": lambda i: top_logprobs(logits[i], 16),
        "torch": lambda i: logits[i].log_softmax(-1).topk(16),
    }
    return Work(logits[0].nbytes, copies=copies, rivals=rivals)


def cases() -> Iterator[Case]:
    def case(kernel: str, shape: str, make: Callable[..., Work], *sizes: Any, **more: Any) -> Case:
        again = more.pop("again", False)
        return Case(kernel, shape, lambda bench: make(*sizes, bench=bench, **more), again)

    yield case("decode", "64 × 8k", _attention, 64, 1, 8192)
    yield case("decode", "1 × 1k", _attention, 1, 1, 1024)
    for rows in (1, 8, 32, 64, 256):
        for context, name in ((512, "512"), (4096, "4k"), (32768, "32k")):
            yield case("decode", f"{rows} × {name}", _attention, rows, 1, context, again=True)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        name = str(dtype).removeprefix("torch.")
        yield case("decode", f"64 × 8k {name}", _attention, 64, 1, 8192, page_dtype=dtype)
    yield case("verify", "64 × 8k, 5 tokens", _attention, 64, 5, 8192)
    yield case("prefill", "8k", _attention, 1, 8192, 8192)
    yield case("prefill", "512 after 8k", _attention, 1, 512, 8192)
    yield case("shared", "16 × 8 beams, 4k", _shared, 16, 8, 4096, 64)
    yield case("store", "64 rows", _store, 64)
    yield case("store", "8k tokens", _store, 8192)
    yield case("store", "8k tokens fp8", _store, 8192, page_dtype=torch.float8_e4m3fn)
    yield case("copy_pages", "1 GB", _copy, 256)
    yield case("add_rms_norm", "64 × 4096", _norm, 64)
    yield case("add_rms_norm", "8k × 4096", _norm, 8192)
    yield case("add_layer_norm", "8k × 4096", _norm, 8192, rms=False)
    yield case("gate", "8k × 14336", _gate, 8192)
    yield case("activate", "8k × 16384", _activate, 8192)
    for tokens in (1, 64, 2048):
        yield case("experts", f"{tokens} × 8 of 128", _experts, tokens, again=tokens == 1)
    for rows in (1, 16):
        for kind in ("float", "int8", "fp8", "int4"):
            yield case("linear", f"{rows} × 28672 × 4096 {kind}", _linear, rows, kind)
    for kind in ("float", "int8"):  # few outputs: cut along the rows
        narrow = {"out": 4096, "inner": 14336}
        yield case("linear", f"1 × 4096 × 14336 {kind}", _linear, 1, kind, **narrow)
    yield case("sample", "128 × 131k", _sample, 128)
    yield case("sample", "1 × 131k", _sample, 1)
    yield case("sample", "1 × 131k unfiltered", _sample, 1, filters=False)
    yield case("penalise", "128 × 131k", _penalise, 128)
    yield case("beam step", "128 × 131k", _beams, 128)
