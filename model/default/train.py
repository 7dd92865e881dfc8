"""The recipe of the embedded model: `python -m model.default.train`.

Corpus and tokenizer are made from the Python installation that runs this; the network is the
product's own `Decoder`, called the way the server calls it, without a cache. A run is bounded by
`--minutes` or `--steps`, goes on where it was stopped (`--resume`), and uses a GPU if there is one.

    .cache/default/    checkpoint, loss curve
    model/default/     what the server loads: weights, config, tokenizer (only with --ship)
"""

import argparse
import csv
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model.cache import Rows
from model.config import ModelConfig
from model.decoder import MLP, Attention, Decoder, Linear
from model.default import bpe
from model.default.corpus import Corpus, Source, corpus
from model.default.export import HERE, hf_config, save_model
from model.default.muon import Muon
from model.families import FAMILIES

Ids = npt.NDArray[np.uint16]
WORK = HERE.parents[1] / ".cache" / "default"
CHECKPOINT = "checkpoint.safetensors"
TENSOR = "tensor"  # in the checkpoint's JSON: the name of what lies beside it


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on, and nothing of the machine."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 704
    context: int = 1024

    tokens: int = 4096  # of a step
    micro: int = 1024  # of one forward: activations stay near the core
    lengths: tuple[tuple[float, int], ...] = ((0.5, 256), (0.85, 512), (1.0, 1024))
    # up to this share of the run, windows are so long: short ones are cheap, and first comes first
    stride: float = 0.5  # a window starts this share of its length after the one before
    shares: dict[str, float] = field(
        default_factory=lambda: {"library": 0.90, "side": 0.03, "exercises": 0.07}
    )
    cut: float = 0.04  # share of words shown in two pieces, see bpe.Encoder
    seed: int = 1

    muon_lr: float = 0.02
    adam_lr: float = 0.004
    decay: float = 0.1
    warmup: float = 0.02  # share of the run
    floor: float = 0.01  # the cosine ends here
    clip: float = 1.0


SMOKE = Recipe(
    vocabulary=512, hidden=64, layers=2, heads=2, kv_heads=1, feed_forward=128, context=128,
    tokens=1024, micro=1024, lengths=((1.0, 128),),
)  # fmt: skip


def network(recipe: Recipe) -> ModelConfig:
    return FAMILIES["llama"].read("llama", hf_config(asdict(recipe)))


# ── data ──────────────────────────────────────────────────────────────────────────────────────


class Windows:
    """Windows of one stream of ids, a stride apart, each once a lap and neighbours far apart."""

    def __init__(self, ids: Ids, stride: float) -> None:
        self.ids, self.stride, self.drawn = ids, stride, 0

    def next(self, length: int) -> Ids:
        """[length + 1]: inputs, and targets one to the right"""
        stride = max(1, int(length * self.stride))
        count = max(1, (len(self.ids) - length - 1) // stride)
        lap, turn = divmod(self.drawn, count)
        leap = round(count * 0.618)
        while math.gcd(leap, count) != 1:
            leap += 1
        # Every lap begins elsewhere, so that no token always meets the same window's edge.
        start = (turn * leap % count) * stride + lap * 97 % stride
        start = min(start, max(0, len(self.ids) - length - 1))
        self.drawn += 1
        return self.ids[start : start + length + 1]


class Mixture:
    """Rows for a step, drawn from the groups by their shares."""

    def __init__(self, streams: dict[str, Ids], recipe: Recipe) -> None:
        self.windows = {name: Windows(streams[name], recipe.stride) for name in recipe.shares}
        self.recipe = recipe

    def rows(self, step: int, length: int) -> Tensor:
        """[rows, length + 1]"""
        random = Random(self.recipe.seed * 1_000_003 + step)  # noqa: S311
        names, weights = list(self.recipe.shares), list(self.recipe.shares.values())
        chosen = random.choices(names, weights, k=self.recipe.tokens // length)
        rows = np.stack([self.windows[name].next(length) for name in chosen])
        return torch.from_numpy(rows.astype(np.int64))


def stream(sources: list[Source], encoder: bpe.Encoder, recipe: Recipe) -> Ids:
    """All texts, in one order that mixes directories, each after an end-of-text."""
    random = Random(recipe.seed)  # noqa: S311
    ids: list[int] = []
    for source in random.sample(sources, len(sources)):
        ids.append(encoder.end)
        ids += encoder.encode(source.text, recipe.cut, random)
    return np.array(ids, np.uint16)


def prepare(recipe: Recipe, texts: Corpus, folder: Path) -> dict[str, Ids]:
    """Trains the tokenizer, writes it into the folder, and encodes the corpus, group by group."""
    learned = [source.text for source in texts.library + texts.exercises]
    merges = bpe.train(learned, recipe.vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(merges, folder)
    encoder, plain = bpe.Encoder(merges), replace(recipe, cut=0.0)
    groups = {name: stream(getattr(texts, name), encoder, recipe) for name in recipe.shares}
    return groups | {"held_out": stream(texts.held_out, encoder, plain)}


# ── the network and its loss ──────────────────────────────────────────────────────────────────


def initialise(decoder: Decoder, seed: int) -> None:
    """Branches begin silent, their last matrices zero, so that depth costs nothing at first."""
    torch.manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.ones_(weight)
        elif name.endswith(("out.weight", "down.weight")):
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.normal_(weight, std=0.02)


def loss_of(decoder: Decoder, rows: Tensor, chunk: int = 256) -> Tensor:
    """Mean next-token loss of [rows, length + 1]; logits in chunks, because all are too many."""
    count, length = rows.shape[0], rows.shape[1] - 1
    where = Rows.alone([length] * count, rows.device)
    hidden = decoder(rows[:, :-1].flatten(), where)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, targets in zip(hidden.split(chunk), rows[:, 1:].flatten().split(chunk)):
        total = total + F.cross_entropy(decoder.logits(part), targets, reduction="sum")
    return total / (count * length)


def optimisers(decoder: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices: dict[Tensor, tuple[int, ...]] = {}
    for module in decoder.modules():
        if isinstance(module, Attention):
            matrices |= {_plain(module.qkv): module.shares, _plain(module.out): (recipe.hidden,)}
        elif isinstance(module, MLP):
            width = recipe.feed_forward
            matrices |= {_plain(module.up): (width, width), _plain(module.down): (recipe.hidden,)}
    rest = [weight for weight in decoder.parameters() if weight not in matrices]
    return [
        Muon(matrices, recipe.muon_lr, recipe.decay),
        torch.optim.AdamW(rest, recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _plain(linear: Linear) -> Tensor:
    assert isinstance(linear.weight, Tensor)
    return linear.weight


def schedule(progress: float, recipe: Recipe) -> float:
    """The share of the full rate: a straight warm-up, then a cosine."""
    if progress < recipe.warmup:
        return max(progress, 1e-3) / recipe.warmup
    along = (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.floor + (1 - recipe.floor) * (1 + math.cos(math.pi * min(along, 1.0))) / 2


# ── the run ───────────────────────────────────────────────────────────────────────────────────


class Run:
    """One training, which can be stopped at any step and taken up again."""

    def __init__(
        self, recipe: Recipe, streams: dict[str, Ids], work: Path, device: str, workers: int
    ) -> None:
        self.recipe, self.work = recipe, work
        self.pool = ThreadPoolExecutor(workers)
        self.config = network(recipe)
        self.decoder = Decoder(self.config).to(device)
        initialise(self.decoder, recipe.seed)
        self.fast = Decoder(self.config).to(device)  # what computes: matrices in bfloat16
        self._follow()
        self.optimisers = optimisers(self.decoder, recipe)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimisers]
        self.mixture, self.held_out = Mixture(streams, recipe), streams["held_out"]
        self.device = device
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.curve: list[dict[str, float]] = []

    def train(self, steps: int, minutes: float, every: int, save_every: float) -> None:
        """Until so many steps, or, where steps is 0, so many minutes, earlier parts included."""
        bar = tqdm(total=1.0, initial=self.progress(steps, minutes), mininterval=5.0,
                   bar_format="{percentage:5.1f}%|{bar:20}| {elapsed} {postfix}")  # fmt: skip
        saved = time.monotonic()
        while (progress := self.progress(steps, minutes)) < 1:
            began = time.monotonic()
            loss = self._step(progress)
            self.seconds += time.monotonic() - began
            row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1),
                   "loss": round(loss, 4)}  # fmt: skip
            if self.step % every == 0 or self.progress(steps, minutes) >= 1:
                row["held_out"] = round(held_out_loss(self.fast, self.held_out), 4)
            self.curve.append(row)
            bar.n = min(1.0, self.progress(steps, minutes))
            bar.set_postfix(
                step=self.step, loss=f"{loss:.3f}", rate=f"{self.tokens / self.seconds:.0f}/s"
            )
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        bar.close()

    def progress(self, steps: int, minutes: float) -> float:
        return self.step / steps if steps else self.seconds / 60 / minutes

    def _step(self, progress: float) -> float:
        recipe = self.recipe
        length = next(length for until, length in recipe.lengths if progress < until)
        rows = self.mixture.rows(self.step, length).to(self.device)
        loss = self._gradients(rows.split(max(1, recipe.micro // length)), len(rows))
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), recipe.clip)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * schedule(progress, recipe)
            optimiser.step()
            optimiser.zero_grad()
        self._follow()
        self.step += 1
        self.tokens += rows.shape[0] * length
        return loss

    def _gradients(self, parts: Sequence[Tensor], count: int) -> float:
        """Parts go to whichever worker is free, each on one core: where others use the machine
        too, operators spread over all cores wait for the slowest (measured: 8 times slower)."""
        weights = list(self.fast.parameters())

        def of(part: Tensor) -> tuple[float, tuple[Tensor, ...]]:
            loss = loss_of(self.fast, part) * (len(part) / count)
            return loss.item(), torch.autograd.grad(loss, weights)

        total = 0.0
        for loss, gradients in self.pool.map(of, parts):
            total += loss
            for weight, gradient in zip(self.decoder.parameters(), gradients, strict=True):
                weight.grad = gradient.float() if weight.grad is None else weight.grad + gradient
        return total

    def _follow(self) -> None:
        """The weights that learn are float32; those that compute are copies, rounded each step."""
        for fast, weight in zip(self.fast.parameters(), self.decoder.parameters(), strict=True):
            fast.data = weight.data.to(torch.bfloat16 if weight.ndim > 1 else torch.float32)

    def save(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "decoder": self.decoder.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "drawn": {name: windows.drawn for name, windows in self.mixture.windows.items()},
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "curve": self.curve,
        }
        tensors: dict[str, Tensor] = {}
        plain = json.dumps(_without_tensors(state, "", tensors))
        unfinished = self.work / "checkpoint.new"
        save_file(tensors, unfinished, {"state": plain})
        unfinished.replace(self.work / CHECKPOINT)
        write_curve(self.curve, self.work)

    def ship(self, folder: Path) -> None:
        """What the server loads, and the curve that led there."""
        save_model(self.decoder.state_dict(), hf_config(asdict(self.recipe)), folder)
        write_curve(self.curve, folder)
        draw_curve(self.curve, folder / "loss.png")

    def resume(self) -> None:
        with safe_open(self.work / CHECKPOINT, "pt", device=str(self.device)) as file:
            state = _with_tensors(json.loads(file.metadata()["state"]), file)
        if state["recipe"] != json.loads(json.dumps(asdict(self.recipe))):
            raise ValueError(
                f"{self.work / CHECKPOINT} was made by another recipe; "
                "move it away, or train without --resume"
            )
        self.decoder.load_state_dict(state["decoder"])
        for optimiser, known in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(known)
        for name, windows in self.mixture.windows.items():
            windows.drawn = state["drawn"][name]
        for name in ("step", "seconds", "tokens", "curve"):
            setattr(self, name, state[name])
        self._follow()


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it; what is a tensor stays behind, under its path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous().clone()
        return {TENSOR: path}
    if isinstance(value, dict):
        pairs = [
            (key, _without_tensors(one, f"{path}/{key}", tensors)) for key, one in value.items()
        ]
        return {"pairs": [list(pair) for pair in pairs]}
    if isinstance(value, list | tuple):
        return [_without_tensors(one, f"{path}/{i}", tensors) for i, one in enumerate(value)]
    return value


def _with_tensors(value: Any, file: Any) -> Any:
    """The way back: keys are what they were, numbers too."""
    if isinstance(value, list):
        return [_with_tensors(one, file) for one in value]
    if isinstance(value, dict):
        if TENSOR in value:
            return file.get_tensor(value[TENSOR])
        return {key: _with_tensors(one, file) for key, one in value["pairs"]}
    return value


def held_out_loss(decoder: Decoder, ids: Ids) -> float:
    """A quick look, nats a token; `evaluate.py` measures properly."""
    length = min(512, decoder.config.context)
    starts = np.linspace(0, len(ids) - length - 1, 24).astype(int)
    rows = np.stack([ids[start : start + length + 1] for start in starts])
    device = next(decoder.parameters()).device
    with torch.no_grad():
        return loss_of(decoder, torch.from_numpy(rows.astype(np.int64)).to(device)).item()


def write_curve(curve: list[dict[str, float]], folder: Path) -> None:
    names = ["step", "tokens", "seconds", "loss", "held_out"]
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(curve)


def draw_curve(curve: list[dict[str, float]], path: Path) -> None:
    """The curve as a picture, where matplotlib is installed (`pip install kvist[bench]`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture of the loss curve, only loss.csv")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    millions = [row["tokens"] / 1e6 for row in curve]
    axes.plot(millions, [row["loss"] for row in curve], linewidth=0.4, alpha=0.6, label="training")
    seen = [(m, row["held_out"]) for m, row in zip(millions, curve) if "held_out" in row]
    axes.plot(*zip(*seen), marker="o", markersize=3, label="held out")
    axes.set(xlabel="million tokens", ylabel="loss, nats a token", ylim=(1, 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def smoke() -> int:
    """The whole way at a hundredth of the size: tokenizer, network, checkpoint, resume, export."""
    texts = corpus()
    few = Corpus(texts.library[:40], texts.side[:20], texts.exercises[:300], texts.held_out[:5], [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for steps, resume in ((30, False), (60, True)):
            run = start(SMOKE, few, folder, folder, resume, workers=1)
            run.train(steps=steps, minutes=0, every=30, save_every=math.inf)
        run.ship(folder)
        first, last = run.curve[0]["loss"], run.curve[-1]["held_out"]
    print(f"loss {first:.2f} -> {last:.2f} on held-out files, nats a token, in {run.step} steps")
    return 0 if last < first - 1 else 1


def start(
    recipe: Recipe, texts: Corpus, folder: Path, work: Path, resume: bool, workers: int
) -> Run:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # a worker a core
    run = Run(recipe, prepare(recipe, texts, folder), work, device, workers)
    if resume:
        run.resume()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model.default.train", description=__doc__)
    parser.add_argument("--minutes", type=float, default=90, help="of training, when --steps is 0")
    parser.add_argument("--steps", type=int, default=0, help="exact length of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--ship", action="store_true", help="write the result into model/default")
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoint and loss curve")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cores; a GPU needs 1")
    parser.add_argument(
        "--smoke", action="store_true", help="the whole way in a minute, thrown away"
    )
    chosen = parser.parse_args()
    if chosen.smoke:
        return smoke()
    texts = corpus()
    folder = HERE if chosen.ship else chosen.work
    run = start(Recipe(), texts, folder, chosen.work, chosen.resume, chosen.workers)
    run.train(chosen.steps, chosen.minutes, every=100, save_every=120)
    run.ship(folder)
    record = texts.record() | {
        "recipe": asdict(run.recipe),
        "steps": run.step,
        "tokens": run.tokens,
    }
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
