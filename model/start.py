"""From a folder to a runner that is ready: weights, kernels, threads, and as many pages as fit."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kernels import backend, native
from kernels.backend import Choice, Probe, verify
from model import device as machine
from model.cache import PAGE, Cache
from model.config import ModelConfig
from model.decoder import Decoder
from model.pack import pack_decoder
from model.runner import Runner
from model.weights import load

RESERVE = 512 << 20  # bytes left for what a step computes
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
    quantize: Literal["none", "int8"] = "none",
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
    torch.set_num_threads(threads)
    where = machine.pick_device(device)
    decoder = load(folder, dtype=dtype, device=where, quantization=quantize, context=context or 0)
    config = decoder.config
    context = context or config.context
    stored = next(iter(decoder.parameters())).dtype
    parameters, width = sum(p.numel() for p in decoder.parameters()), stored.itemsize
    ways = ""
    if where.type == "cpu" and kernels != "reference":
        ways = _enable_native(decoder, quantize == "int8", threads)
        stored = stored if ways else torch.float32  # what native kernels compute in
        if not (ways or config.experts):
            # What is left to torch is small: threads that meet after each of its operations would
            # wait for their turns on a busy machine, for longer than all the work takes.
            torch.set_num_threads(1)
    if deterministic and (ways or where.type != "cpu"):
        raise DoesNotFitError(
            "--deterministic needs the native CPU kernels, whose sums do not depend on the batch; "
            f"here, {ways or 'the device is a GPU, where large products are cuBLAS’s'}"
        )
    pages = pages or _fitting(config, stored, where, memory, page_size, rows * context)
    cache = Cache(config, pages, page_size, stored, where)
    runner = Runner(decoder, cache, rows)
    probe = Probe(where, stored, config.heads, config.kv_heads, config.head_dim, page=page_size)
    choices = verify(probe)
    about = {
        "family": config.family,
        "parameters": parameters,
        "weight_bytes": width,
        "device": _name(where),
        "dtype": str(stored).removeprefix("torch."),
        "quantize": quantize,
        "threads": threads,
        "native": ways or "yes",
        "kernels": {choice.kernel: f"{choice.way}: {choice.reason}" for choice in choices},
        "pages": pages,
        "page_size": page_size,
        "capacity": pages * page_size,
        "context": context,
        "load_seconds": round(time.monotonic() - began, 2),
    }
    return Ready(runner, config, context, pages, choices, about)


def _enable_native(decoder: Decoder, int8: bool, threads: int) -> str:
    """Why not; empty when it is done."""
    native.use_threads(threads)
    try:
        pack_decoder(decoder, int8_head=int8)
    except native.NotHere as why:
        return str(why)
    return ""


def _fitting(
    config: ModelConfig,
    dtype: torch.dtype,
    where: torch.device,
    memory: float,
    page_size: int,
    tokens: int,
) -> int:
    """No more pages than `tokens` would fill, and no more than the device has room for."""
    size = Cache.page_bytes(config, page_size, dtype)
    free = machine.free_memory(where)
    room = int(free * CPU_SHARE) if where.type == "cpu" else int(free * memory) - RESERVE
    pages = min(-(-tokens // page_size), room // size)
    if pages < 2:
        raise DoesNotFitError(
            f"{_name(where)} has {free >> 20} MiB free after the weights, and one page of "
            f"{page_size} tokens takes {size >> 20} MiB: use --quantize int8 or a smaller model"
        )
    return pages


def _name(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
