"""How long a token takes: the first, over the prompt's length; the next, over context and batch.

    python -m benchmarks.latency [MODEL] [--prompts 16 256 1024] [--batches 1 4 16]

In this process, without HTTP. Percentiles over tokens, not means; the last columns are the share
of the machine's limits that a step reached: bytes of weights and of keys and values read against
the memory's bandwidth, and operations against the rate of products, both measured in this run.
"""

import resource
import time
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import harness, limits
from model.cache import Cache
from model.device import cores
from model.quantize import FORMATS
from model.sampling import Sampling
from server import Engine
from server.engine.request import Request

NEW = 32  # tokens measured after the first


def token_times(engine: Engine, prompt: int, batch: int) -> tuple[float, list[float]]:
    """Seconds to the first token of all, and of every step after it."""
    chance = np.random.default_rng(0)
    greedy = Sampling(temperature=0)
    for i in range(batch):
        ids = chance.integers(1, engine.parts.ready.config.vocabulary - 1, prompt).tolist()
        name = f"{prompt}-{batch}-{i}-{time.monotonic_ns()}"
        engine.submit(Request(id=name, prompt=ids, max_tokens=NEW + 1, sampling=greedy))
    began = time.perf_counter()
    told: set[str] = set()
    while len(told) < batch:
        told |= {event.id for event in engine.step() if event.choices}
    first, steps = time.perf_counter() - began, []
    while not engine.idle:
        before = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - before)
    return first, steps


def weights(engine: Engine) -> tuple[int, int]:
    """Bytes that a step reads of them, and parameters that multiply."""
    config, about = engine.parts.ready.config, engine.info
    form = FORMATS.get(about["quantize"])
    bits = form.bits if form else 8 * about["weight_bytes"]
    embedded = 0 if config.tied else config.vocabulary * config.hidden
    used = about["parameters"] - embedded
    return used * bits // 8, used


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", nargs="?", help="a folder or hub name; nothing: the embedded one")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 256, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--quantize", choices=["none", *FORMATS], default="none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or cores())
    ceiling = limits.measure(3)
    engine = Engine(
        options.model, threads=options.threads, quantize=options.quantize, prefix_cache=False
    )
    read, used = weights(engine)
    config = engine.parts.ready.config
    cache = engine.parts.ready.runner.cache
    kv_token = Cache.page_bytes(config, 1, cache.pages.dtype)
    longest = engine.info["context"] - NEW - 1
    cases = [(p, b) for p in options.prompts for b in options.batches if p <= longest]
    token_times(engine, 8, 1)
    rows: list[harness.Row] = []
    for prompt, batch in tqdm(cases, desc="latency", disable=None, leave=False):
        first, steps = token_times(engine, prompt, batch)
        low, middle, high = np.percentile(steps, [5, 50, 95]) * 1e3
        rows.append(
            {
                "prompt": prompt,
                "batch": batch,
                "first ms": first * 1e3,
                "next ms": float(middle),
                "p5": float(low),
                "p95": float(high),
                "tok/s": batch / float(middle) * 1e3,
                "of bandwidth": (read + batch * kv_token * prompt) / (middle / 1e3) / ceiling.read,
                "of products": 2 * used * prompt * batch / first / ceiling.float32,
            }
        )
    lines = {
        f"batch {batch}": (
            [float(row["prompt"]) for row in rows if row["batch"] == batch],
            [float(row["next ms"]) for row in rows if row["batch"] == batch],
        )
        for batch in options.batches
    }
    harness.plot(options.plot, "Time per token", "tokens of context", "ms", lines)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    about = {name: engine.info[name] for name in ("model", "parameters", "dtype", "quantize")}
    harness.finish("latency", rows, options, about=about, peak=peak, limits=asdict(ceiling))


if __name__ == "__main__":
    main()
