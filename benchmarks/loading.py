"""How long a checkpoint takes to load, against reading its files.

    python -m benchmarks.loading [--shape 1b] [--folder on-that-disk] [--rounds 3]

A checkpoint of noise in bfloat16 and in shards is written to a temporary folder. Its files are
then read, and loaded, in turns and in one process, from a warm page cache: a disk that is slower
than memory hides what this looks for. `into fresh memory` is the fair rival, as weights must be
somewhere; `through one buffer` is what nothing that keeps what it reads can reach. `start` is all
that a server does before its first step, in a process of its own, whose largest memory is shown
above what torch takes when it is imported and above the weights' own bytes.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from kernels.native import Packed
from model.decoder import Decoder
from model.quantize import Quantize
from model.start import start as start_model
from model.weights import load

SHAPES = {
    "small": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
}
SHARD = 500 << 20
Seconds = tuple[float, float]  # by the clock, and of work, which neighbours do not lengthen
READ, BUFFERED = "read into fresh memory", "read through one buffer"
LOAD = "load as bfloat16"


def write(folder: Path, shape: str) -> None:
    """Llama 3.2 1B's shape, or half its width."""
    config = transformers.LlamaConfig(
        vocab_size=128_256 if shape == "1b" else 32_000,
        num_attention_heads=SHAPES[shape]["hidden_size"] // 64,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        **SHAPES[shape],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = transformers.LlamaForCausalLM(config).state_dict()
    del tensors["lm_head.weight"]
    noise = torch.randn(1 << 20, dtype=torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    names = {}
    for name, meta in tqdm(tensors.items(), desc="making weights"):
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD:
            save(folder, shards)
        repeats = -(-meta.numel() // len(noise))
        shards[-1][name] = noise.repeat(repeats)[: meta.numel()].view(meta.shape)
        names[name] = shard_name(len(shards))
    save(folder, shards)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def save(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Writes the last shard and begins another."""
    safetensors.torch.save_file(shards[-1], folder / shard_name(len(shards)))
    shards[-1].clear()
    shards.append({})


def read_fresh(files: list[Path]) -> object:
    kept = []
    for path in files:
        kept.append(np.empty(path.stat().st_size, np.uint8))  # numpy asks for huge pages too
        fill(path, kept[-1].data)
    return kept


def read_buffered(files: list[Path]) -> None:
    buffer = memoryview(bytearray(16 << 20))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fill(path: Path, memory: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        done = 0
        while count := file.readinto(memory[done:]):
            done += count


def measure(folder: Path, rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of every way, in turns, so that a slow moment hits all of them. The first round is
    left out: a virtual machine gets memory that it never used from its host, at 0.3 GB/s."""
    files = sorted(folder.glob("*.safetensors"))
    ways: dict[str, Callable[[], object]] = {
        BUFFERED: lambda: read_buffered(files),
        READ: lambda: read_fresh(files),
        LOAD: lambda: load(folder, dtype="bfloat16"),
        "load as float32": lambda: load(folder, dtype="float32"),
        "load as int8": lambda: load(folder, dtype="bfloat16", quantization="int8"),
    }
    seconds: dict[str, list[Seconds]] = {way: [] for way in ways}
    for _ in tqdm(range(rounds + 1), desc="rounds"):
        for way, run in ways.items():
            begin, busy = time.perf_counter(), time.process_time()
            kept = run()
            seconds[way].append((time.perf_counter() - begin, time.process_time() - busy))
            del kept
    return {way: every[1:] for way, every in seconds.items()}


def start(folder: Path, quantize: Quantize) -> dict[str, float]:
    """Run in a process of its own. Pages are left untouched, and so are not taken yet."""
    before, begin = peak(), time.perf_counter()
    ready = start_model(folder, quantize=quantize, context=4096, rows=16)
    seconds = time.perf_counter() - begin
    return {"s": seconds, "above": peak() - before - held(ready.runner.decoder)}


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def held(decoder: Decoder) -> int:
    """Bytes of all weights, however they are kept."""
    found: dict[int, int] = {}
    for module in decoder.modules():
        parts = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        weight = getattr(module, "weight", None)
        parts += (
            [part for part in weight if isinstance(part, Tensor)]
            if isinstance(weight, Packed)
            else []
        )
        found |= {part.data_ptr(): part.nbytes for part in parts}
    return sum(found.values())


def started(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    kinds: tuple[Quantize, ...] = ("none", "int8")
    for kind in kinds:
        every = []
        for _ in tqdm(range(rounds + 1), desc=f"starts, {kind}"):
            with ProcessPoolExecutor(1, get_context("spawn")) as one:
                every.append(one.submit(start, folder, kind).result())
        found[kind] = {key: statistics.median(e[key] for e in every[1:]) for key in every[0]}
    return found


def rows(
    size: int, seconds: dict[str, list[Seconds]], starts: dict[str, dict[str, float]]
) -> Iterator[harness.Row]:
    """Medians, and against reading."""
    middle = {
        way: [statistics.median(times) for times in zip(*every, strict=True)]
        for way, every in seconds.items()
    }
    for way, (wall, cpu) in middle.items():
        row = {"way": way, "s": wall, "GB/s": size / wall / 1e9, "cpu s": cpu}
        yield row | {"× reading": wall / middle[READ][0], "in cpu s": cpu / middle[READ][1]}
    for kind, one in starts.items():
        row = {"way": f"start, quantize {kind}", "s": one["s"]}
        yield row | {"× reading": one["s"] / middle[READ][0], "MB above": one["above"] / 1e6}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or 1)  # a server loads so
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        write(Path(name), given.shape)
        size = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
        seconds = measure(Path(name), given.rounds)
        starts = started(Path(name), given.rounds)
    found = list(rows(size, seconds, starts))
    columns = dict.fromkeys(name for row in found for name in row)
    ratio = next(row["× reading"] for row in found if row["way"] == LOAD)
    harness.finish(
        "loading", [{name: row.get(name) for name in columns} for row in found], given,
        shape=given.shape, bytes=size, rounds=given.rounds, ratio=ratio, goal=1.3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
