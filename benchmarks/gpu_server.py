"""The engine against transformers' own on one device: the same noise, prompts and greedy choices.

Part of `benchmarks.gpu_suite`. Both get all prompts at once, and each has a round to warm up;
transformers' `generate` is one batch that begins and ends together, as all texts here do.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.peers import Work
from benchmarks.peers.source import SHAPES, write
from model.sampling import Sampling
from server import Engine

ROUNDS = 3
WORKS = {"1 stream": Work(1, 128, 128), "64 streams": Work(64, 128, 128)}
SMALL = {"1 stream": Work(1, 16, 8), "3 streams": Work(3, 16, 8)}

Generate = Callable[[list[list[int]], int], list[list[int]]]


def measure(dry: bool) -> list[harness.Row]:
    shape = SHAPES["check" if dry else "llama-3.2-1b"]
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    works = SMALL if dry else WORKS
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(shape, Path(folder))
        for name, make in {"kvist": _kvist, "transformers": _transformers}.items():
            generate = make(Path(folder), dtype)
            speeds[name] = [_speed(generate, work, shape["vocabulary"]) for work in works.values()]
            del generate
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return [
        {"work": work, "kvist tok/s": ours, "transformers tok/s": theirs, "ratio": ours / theirs}
        for work, ours, theirs in zip(works, *speeds.values())
    ]


def _speed(generate: Generate, work: Work, vocabulary: int) -> float:
    """New tokens a second, the median round's."""
    times = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        said = generate(work.prompts(vocabulary), work.new)
        times.append(time.perf_counter() - began)
        if [len(ids) for ids in said] != [work.new] * work.streams:
            raise RuntimeError(f"{work} was answered with {[len(ids) for ids in said]} tokens")
    return work.streams * work.new / statistics.median(times[1:])


def _kvist(folder: Path, dtype: str) -> Generate:
    work = WORKS["64 streams"]
    pages = work.streams * (work.prompt + work.new) // 16
    engine = Engine(str(folder), dtype=dtype, rows=64, pages=pages, prefix_cache=False)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        greedy = Sampling(temperature=0)
        said = engine.generate(
            prompts, max_tokens=new, sampling=greedy, ignore_eos=True, progress=False
        )
        return [list(event.choices[0].tokens) for event in said]

    return generate


def _transformers(folder: Path, dtype: str) -> Generate:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        given = torch.tensor(prompts, device=device)
        said = network.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        found: list[list[int]] = said[:, given.shape[1] :].tolist()
        return found

    return generate
