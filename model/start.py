"""From a folder to a runner that is ready: weights, kernels, threads, and as many pages as fit."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kernels import backend, build, native
from kernels.backend import Choice, verify
from model import device as machine
from model.cache import FLOATS, FORMATS, PAGE, Cache
from model.config import ModelConfig
from model.decoder import Decoder
from model.manifest import read_manifest
from model.pack import pack_decoder
from model.quantize import Quantize, count
from model.runner import Runner
from model.trust import probes
from model.weights import load

RESERVE = 512 << 20  # bytes left for what a step computes
KvDtype = Literal["auto", "float32", "bfloat16", "int8", "fp8"]
CPU_SHARE = 0.25  # of the free memory, at most, for pages: others live on this machine too


class DoesNotFitError(Exception):
    """What is needed, what there is, and the flag that changes it."""


@dataclass(frozen=True)
class Ready:
    runner: Runner
    config: ModelConfig
    context: int  # the longest text
    pages: int
    choices: list[Choice]  # how each kernel runs, and why
    about: dict[str, Any]  # for people


def start(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Quantize = "none",
    kv_dtype: KvDtype = "auto",
    context: int | None = None,
    pages: int | None = None,
    page_size: int = PAGE,
    memory: float = 0.9,
    rows: int = 256,
    threads: int = 0,
    kernels: str = "auto",
    deterministic: bool = False,
) -> Ready:
    """Nothing means: the model's own context, as many pages as fit, a thread for each core."""
    began = time.monotonic()
    backend.WISH = kernels
    threads = threads or machine.cores()
    torch.set_num_threads(1)  # weights come in small pieces: two threads took 90 instead of 11 s
    where = machine.pick_device(device)
    native_wanted = where.type == "cpu" and kernels != "reference"
    stored = machine.pick_dtype(dtype, where, read_manifest(folder).dtype)
    decoder = load(
        folder,
        dtype=stored,
        device=where,
        quantization=quantize,
        head=native_wanted and quantize in ("int8", "int4") and native.has_int8(),
        keep=native_wanted and build.here(),
        context=context or 0,
    )
    config = decoder.config
    context = context or config.context
    parameters = count(decoder)
    weights = _most(decoder) if quantize == "none" else quantize
    ways = _enable_native(decoder, threads) if native_wanted else ""
    rounded = quantize in ("int8", "int4") or stored == torch.bfloat16
    in_native = native_wanted and not ways
    if in_native:
        stored = torch.float32  # what native kernels compute in
        weights = "float32" if config.experts else weights  # experts are torch's
    if not native_wanted or ways or config.experts or _in_torch(where, quantize, kv_dtype):
        torch.set_num_threads(threads)
    # Else what is left to torch is small: threads that meet after each of its operations would
    # wait for their turns on a busy machine, for longer than all the work takes.
    if deterministic and (why_not := ways or _in_torch(where, quantize, kv_dtype)):
        raise DoesNotFitError(
            "--deterministic needs the native CPU kernels, whose sums do not depend on the batch; "
            f"here, {why_not}"
        )
    brief = in_native and config.head_dim % 16 == 0 and page_size % 16 == 0
    kept = _kept(kv_dtype, stored, brief, rounded)
    pages = _fitting(config, kept, where, memory, page_size, rows * context, pages)
    cache = Cache(config, pages, page_size, kept, where)
    runner = Runner(decoder, cache, rows)
    choices = [verify(probe) for probe in probes(config, cache, stored)][-1]
    about = {
        "family": config.family,
        "parameters": parameters,
        "device": _name(where),
        "dtype": _plain(stored),
        "weights": weights,
        "quantize": quantize,
        "kv_dtype": _plain(kept),
        "threads": threads,
        "native": ways or "yes",
        "kernels": {choice.kernel: f"{choice.way}: {choice.reason}" for choice in choices},
        "warnings": [
            *_warnings(where, quantize, kv_dtype, choices),
            *_beyond(context, config.context),
        ],
        "pages": pages,
        "page_size": page_size,
        "capacity": pages * page_size,
        "context": context,
        "load_seconds": round(time.monotonic() - began, 2),
    }
    return Ready(runner, config, context, pages, choices, about)


def _enable_native(decoder: Decoder, threads: int) -> str:
    """Why not; empty when it is done."""
    try:
        native.use_threads(threads)
        pack_decoder(decoder)
    except build.NotHere as why:
        return str(why)
    return ""


def _kept(wish: str, stored: torch.dtype, brief: bool, rounded: bool) -> torch.dtype:
    """What pages hold. Where weights are rounded to eight bits, bfloat16 changes a hundredth of
    what they did, is half as much to read, and is multiplied twice as fast by some processors."""
    if wish == "auto":
        return torch.bfloat16 if brief and rounded and machine.has_bfloat16() else stored
    kept = {**FORMATS, **FLOATS}[wish]
    if wish in FLOATS and kept != stored and not (brief and kept == torch.bfloat16):
        raise DoesNotFitError(
            f"--kv-dtype {wish}: pages hold {_plain(stored)} here; "
            "bfloat16 beside float32 needs the native CPU kernels, a head of a multiple of 16 "
            "channels, and pages of a multiple of 16 tokens: use auto, int8 or fp8"
        )
    return kept


def _most(decoder: Decoder) -> str:
    """The format of most weights: a checkpoint may keep some in more bits."""
    count: Counter[torch.dtype] = Counter()
    for weight in decoder.parameters():
        count[weight.dtype] += weight.numel()
    return _plain(count.most_common(1)[0][0])


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_torch(where: torch.device, quantize: str, kv_dtype: str) -> str:
    """What of a step native kernels cannot do; empty: nothing."""
    if where.type != "cpu":
        return "the device is a GPU, where large products are cuBLAS’s"
    if quantize == "fp8" or (quantize == "int4" and not native.has_int8()):
        return f"--quantize {quantize} has no native product"
    if kv_dtype in FORMATS:
        return f"--kv-dtype {kv_dtype} has no native attention"
    return ""


def _warnings(
    where: torch.device, quantize: str, kv_dtype: str, choices: list[Choice]
) -> list[str]:
    """What whoever started this did not expect, for the log."""
    if where.type == "cpu":
        why = _in_torch(where, quantize, kv_dtype)
        return [f"{why}, so torch's way serves: right, and several times as slow"] if why else []
    return [
        f"{choice.kernel} runs in plain torch, which is slow: {choice.reason}"
        for choice in choices
        if choice.way == "torch"
    ]


def _beyond(context: int, made_for: int) -> list[str]:
    if context <= made_for:
        return []
    return [f"the model was made for {made_for} tokens: up to {context}, its text may get worse"]


def _fitting(
    config: ModelConfig,
    dtype: torch.dtype,
    where: torch.device,
    memory: float,
    page_size: int,
    tokens: int,
    wish: int | None,
) -> int:
    """No more pages than `tokens` would fill, and no more than the device has room for. As many as
    are wished for, if there is room: on a CPU they are taken as they fill, which is too late."""
    size = Cache.page_bytes(config, page_size, dtype)
    free = machine.free_memory(where)
    room = int(free * CPU_SHARE) if where.type == "cpu" else int(free * memory) - RESERVE
    if wish and wish * size > free:
        raise DoesNotFitError(
            f"--pages {wish} take {wish * size >> 20} MiB, and {_name(where)} has {free >> 20} MiB "
            f"free after the weights: ask for at most {free // size}"
        )
    pages = wish or min(-(-tokens // page_size), room // size)
    if pages < 2:
        raise DoesNotFitError(
            f"{_name(where)} has {free >> 20} MiB free after the weights, and one page of "
            f"{page_size} tokens takes {size >> 20} MiB: use --quantize int8, --kv-dtype int8 or a "
            "smaller model"
        )
    return pages


def _name(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
