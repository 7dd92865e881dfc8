"""One command for a GPU that is at hand for minutes: is everything right there, and how fast is it?

    python -m benchmarks.gpu_suite correctness    # every test that needs a GPU
    python -m benchmarks.gpu_suite speed --save   # ceilings, kernels, whole steps, the server
    python -m benchmarks.gpu_suite --dry-run      # both, small, on a machine without one

Each part ends within eight minutes. Whole steps run networks of random weights at the shapes that
matter, token in to token out on the device, as the runner replays them.
"""

import dataclasses
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import gpu_server, harness, limits
from model.batch import LAST_SAMPLE, Batch, Seat
from model.cache import Cache
from model.config import ModelConfig, Rope
from model.decoder import Decoder
from model.quantize import quantize
from model.runner import Runner
from model.sampling import Sampling

NONE = np.zeros(0, np.int32)
PAGE = 16


def llama(
    name: str, hidden: int, layers: int, heads: int, kv: int, width: int, tied: bool
) -> ModelConfig:
    dim = 64 if name.endswith("1B") else 128
    return ModelConfig(
        family="llama",
        vocabulary=128_256,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        feed_forward=width,
        context=8192,
        tied=tied,
        ropes=(Rope(theta=500_000.0, dim=dim),) * layers,
    )


SHAPES = {
    "Llama-3.2-1B": llama("1B", 2048, 16, 32, 8, 8192, tied=True),
    "GPT-2 124M": ModelConfig(
        family="gpt2",
        vocabulary=50_257,
        hidden=768,
        layers=12,
        heads=12,
        kv_heads=12,
        head_dim=64,
        feed_forward=3072,
        context=1024,
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        norm_bias=True,
        positions="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=True,
    ),
    "Llama-3.1-8B": llama("8B", 4096, 32, 32, 8, 14336, tied=False),
}


class Step(NamedTuple):
    shape: str
    rows: int
    context: int
    bar: float | None = None  # the first one, in ms; None: a share of the floor
    weights: str = ""  # fewer bits; empty: as the device computes
    pages: torch.dtype | None = None


STEPS = (
    Step("Llama-3.2-1B", 1, 128, 0.95),
    Step("GPT-2 124M", 1, 128, 0.22),
    Step("Llama-3.1-8B", 1, 128, 4.3),
    Step("Llama-3.1-8B", 1, 128, 2.5, weights="int8"),
    Step("Llama-3.1-8B", 1, 128, weights="fp8"),
    Step("Llama-3.1-8B", 1, 128, weights="int4"),
    Step("Llama-3.1-8B", 64, 2048),
    Step("Llama-3.1-8B", 64, 2048, pages=torch.float8_e4m3fn),
    Step("Llama-3.2-1B", 8, 2048),
    Step("Llama-3.2-1B", 64, 2048),
)


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same network, small enough for a rehearsal."""
    return dataclasses.replace(
        config,
        vocabulary=512,
        hidden=128,
        layers=2,
        heads=4,
        kv_heads=4 if config.kv_heads == config.heads else 2,
        feed_forward=256,
        ropes=config.ropes[:2],
    )


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Random weights, made where they stay."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            decoder = Decoder(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1)
    return decoder


def step_time(step: Step, dry: bool) -> tuple[float, float]:
    """Seconds of a decode step, and the bytes that it must read."""
    config = shrunk(SHAPES[step.shape]) if dry else SHAPES[step.shape]
    rows, context = min(step.rows, 3) if dry else step.rows, step.context
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = build(config, device, dtype)
    if step.weights:
        quantize(decoder, step.weights)
    new = 8 if dry else 96
    width = -(-(context + new) // PAGE)
    cache = Cache(config, rows * width, PAGE, step.pages or dtype, device)
    runner = Runner(decoder, cache, rows, graphs=True)
    table = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    seats = np.arange(rows, dtype=np.int32)
    taken = [Seat(i, Sampling(temperature=0), 0, [], [], context) for i in range(rows)]
    waits: list[Callable[[], object]] = []
    began = 0.0
    for number in range(new):
        if number == new // 4:  # graphs are recorded, and clocks are up
            while waits:
                waits.pop(0)()
            began = time.perf_counter()
        length = context + number
        batch = Batch(
            tokens=np.full(rows, LAST_SAMPLE, np.int32),
            starts=np.arange(rows + 1, dtype=np.int32),
            lengths=np.full(rows, length, np.int32),
            page_table=table[:, : -(-length // PAGE)],
            seats=seats,
            sample_at=seats,
            sample_seat=seats,
            score_at=NONE,
            score_token=NONE,
            beam_at=NONE,
            beam_seat=NONE,
            logprobs=False,
            taken=taken if number == 0 else [],
        )
        waits.append(runner.launch(batch))
        if len(waits) > 1:
            waits.pop(0)()
    while waits:
        waits.pop(0)()
    seconds = (time.perf_counter() - began) / (new - new // 4)
    used = sum(p.nbytes for p in decoder.parameters()) + sum(
        part.nbytes
        for module in decoder.modules()
        if isinstance(weight := getattr(module, "weight", None), tuple)
        for part in weight
    )
    if not config.tied:
        used -= config.vocabulary * config.hidden * dtype.itemsize
    return seconds, used + rows * context * Cache.page_bytes(config, 1, cache.pages.dtype)


def correctness(options: Namespace) -> int:
    if options.dry_run:
        flags = ["-m", "not slow", "tests/model/test_graphs.py", "tests/kernels/test_backend.py"]
    else:
        flags = ["-m", "cuda"]
    return _run(["pytest", "-q", *flags], 480)


def _run(module: list[str], seconds: float) -> int:
    """Its exit status; 1 if it takes too long, which is said."""
    try:
        return subprocess.run(
            [sys.executable, "-m", *module], check=False, timeout=seconds
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"{module[0]} took longer than {seconds:.0f} s and was ended.")
        return 1


def speed(options: Namespace) -> int:
    dry = options.dry_run
    ceiling = limits.measure(2 if dry else 5)
    flags = ["--dry-run"] * dry + ["--save"] * options.save
    status = _run(["benchmarks.kernels", *flags], 300)
    rows: list[harness.Row] = []
    for step in tqdm(STEPS, desc="whole steps", disable=None, leave=False):
        seconds, read = step_time(step, dry)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows.append(
            {
                "step": " ".join(filter(None, (step.shape, step.weights))),
                "rows": step.rows,
                "context": step.context,
                "pages": str(step.pages or "").removeprefix("torch."),
                "ms": seconds * 1e3,
                "first bar": step.bar,
                "floor ms": read / ceiling.read * 1e3,
                "of floor": read / ceiling.read / seconds,
                "tok/s": step.rows / seconds,
            }
        )
    harness.plot(options.plot, "Whole steps", "rows", "share of the floor", _lines(rows))
    served = gpu_server.measure(dry)
    harness.table(served)
    harness.finish("gpu_suite", rows, options, limits=asdict(ceiling), dry_run=dry, server=served)
    return status


def _lines(rows: list[harness.Row]) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = found.setdefault(f"{row['step']} {row['pages']}", ([], []))
        xs.append(float(row["rows"]))
        ys.append(float(row["of floor"]))
    return found


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("part", nargs="?", choices=["correctness", "speed"], help="one of them")
    parser.add_argument("--dry-run", action="store_true", help="rehearse it small, on any machine")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device here: --dry-run rehearses the suite without one.")
        return 1
    parts = {"correctness": correctness, "speed": speed}
    chosen = [options.part] if options.part else list(parts)
    return max(parts[part](options) for part in chosen)


if __name__ == "__main__":
    sys.exit(main())
