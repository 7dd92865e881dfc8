"""What the embedded model can do, in numbers: `python -m model.default.evaluate [--card]`.

Everything is read back from the folder as the server reads it, and computed in float32. With
`--card` the numbers are written into evaluation.json and README.md, which nobody edits by hand.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from model.cache import Rows
from model.decoder import Decoder
from model.default import held_out
from model.default.bpe import END
from model.default.corpus import corpus
from model.default.export import HERE
from model.default.generate import generate
from model.tokenizer import Tokenizer
from model.weights import load

ANSWER = 64  # tokens
COUNTING = [f"{n}, {n + 1}, {n + 2}," for n in (1, 2, 5, 10, 20, 50, 90, 97, 120, 300)]
SAMPLES_SEED = 2026
SAMPLES = ["for i in range(", "import os, ", "class ", "def __init__(self", "1, 2, 3,", "seven is "]


# ── bits per byte ─────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def nats(decoder: Decoder, ids: list[int]) -> float:
    """−ln p of ids[1:], given what stands before, within the context: windows that overlap by
    half, of which the new half counts."""
    context = decoder.config.context
    total, known = 0.0, 1
    while known < len(ids):
        end = min(len(ids), context if known == 1 else known + context // 2)
        begin = max(0, end - context)
        window = torch.tensor(ids[begin:end])
        hidden = decoder(window[:-1], Rows.alone([len(window) - 1]))
        new = end - known
        logits = decoder.logits(hidden[-new:])
        total += torch.nn.functional.cross_entropy(logits, window[-new:], reduction="sum").item()
        known = end
    return total


def text_nats(decoder: Decoder, words: Tokenizer, text: str) -> float:
    return nats(decoder, [end_of(words), *words.encode(text)])


def end_of(words: Tokenizer) -> int:
    """What stands before a text in training, and after it."""
    return words.special[END]


def bits_per_byte(nats: float, texts: list[str]) -> float:
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def measure_files(decoder: Decoder, words: Tokenizer) -> dict[str, Any]:
    """All of every held-out file, as it is in this Python installation."""
    sources = corpus().held_out
    found = [text_nats(decoder, words, s.text) for s in tqdm(sources, desc="held-out files")]
    texts = [source.text for source in sources]
    each = {
        source.name: round(bits_per_byte(n, [source.text]), 3) for source, n in zip(sources, found)
    }
    ids = sum(len(words.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": round(bits_per_byte(sum(found), texts), 4),
        "files": len(texts),
        "bytes": size,
        "bytes_per_token": round(size / ids, 3),
        "each": each,
    }


def measure_excerpts(
    decoder: Decoder, words: Tokenizer, excerpts: dict[str, str]
) -> dict[str, Any]:
    """The fixed sample, excerpt by excerpt, so that a test can measure a few of them again."""
    found = {file: text_nats(decoder, words, text) for file, text in excerpts.items()}
    return {
        "bits_per_byte": round(bits_per_byte(sum(found.values()), list(excerpts.values())), 4),
        "sha256": held_out.digest(excerpts),
        "nats": {file: round(n, 2) for file, n in found.items()},
    }


# ── what it writes ────────────────────────────────────────────────────────────────────────────


def measure_prompts(decoder: Decoder, words: Tokenizer, excerpts: dict[str, str]) -> dict[str, Any]:
    """The share of the held-out prompts that go on as Python, by opening."""
    prompts = held_out.prompts(excerpts)
    answers = _answers(decoder, words, [prompt.text for prompt in prompts])
    verdicts: dict[str, Counter[str]] = {opening: Counter() for opening in held_out.OPENINGS}
    for prompt, answer in zip(prompts, answers, strict=True):
        verdicts[prompt.opening][held_out.verdict(prompt.text, answer)] += 1
    total = sum(verdicts.values(), Counter[str]())
    return {
        "prompts": len(prompts),
        "parses": round(total["parses"] / len(prompts), 3),
        "unfinished": round(total["unfinished"] / len(prompts), 3),
        "wrong": round(total["wrong"] / len(prompts), 3),
        "each": {opening: dict(counts) for opening, counts in verdicts.items()},
    }


def _answers(decoder: Decoder, words: Tokenizer, prompts: list[str]) -> Iterator[str]:
    for prompt in tqdm(prompts, desc="prompts"):
        seen = words.encode(prompt)[ANSWER - decoder.config.context :]  # what fits, with an answer
        yield words.decode(generate(decoder, seen, ANSWER, end_of(words)))


def measure_counting(decoder: Decoder, words: Tokenizer) -> dict[str, int]:
    """For each prompt, the last number reached before the first mistake."""
    return {prompt: _reached(decoder, words, prompt) for prompt in COUNTING}


def _reached(decoder: Decoder, words: Tokenizer, prompt: str) -> int:
    text = prompt + words.decode(generate(decoder, words.encode(prompt), 140, end_of(words)))
    numbers = [int(number) for number in re.findall(r"\d+(?=,)", text)]
    last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            break
        last = number
    return last


def samples(decoder: Decoder, words: Tokenizer) -> dict[str, str]:
    """One draw for each prompt, at temperature 0.8, from one seed: shown as they fall."""
    draws = Random(SAMPLES_SEED)  # noqa: S311
    return {
        prompt: words.decode(
            generate(
                decoder, words.encode(prompt), ANSWER, end_of(words), 0.8, draws.getrandbits(32)
            )
        )
        for prompt in SAMPLES
    }


# ── the card ──────────────────────────────────────────────────────────────────────────────────

MARK = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)


def evaluate(folder: Path) -> dict[str, Any]:
    decoder, words = load(folder, dtype="float32"), Tokenizer.load(folder)
    excerpts = held_out.load()["excerpts"]
    return {
        "parameters": sum(weight.numel() for weight in decoder.parameters()),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "held_out_files": measure_files(decoder, words),
        "held_out_sample": measure_excerpts(decoder, words, excerpts),
        "prompts": measure_prompts(decoder, words, excerpts),
        "counting": measure_counting(decoder, words),
        "samples": samples(decoder, words),
    }


def card(found: dict[str, Any], training: dict[str, Any]) -> str:
    """The part of README.md that is numbers and samples."""
    files, prompts, counting = found["held_out_files"], found["prompts"], found["counting"]
    counted = sum(reached >= _start(prompt) + 29 for prompt, reached in counting.items())
    rows = {
        "parameters": f"{found['parameters']:,}",
        "weights": f"{found['weights_bytes'] / 1e6:.1f} MB, float16",
        "trained on": f"{training['tokens']:,} tokens in {training['steps']:,} steps, "
        f"about {training['tokens'] * training['bytes_per_token'] / 1e6:.0f} MB of text",
        f"bits per byte, {files['files']} held-out files ({files['bytes']:,} bytes)": (
            f"**{files['bits_per_byte']:.3f}** (target 1.25)"
        ),
        "bits per byte, the fixed sample": f"{found['held_out_sample']['bits_per_byte']:.3f}",
        f"of {prompts['prompts']} held-out prompts, go on as Python": (
            f"**{prompts['parses']:.1%}** (target 60 %); {prompts['unfinished']:.1%} do not finish "
            f"the statement in {ANSWER} tokens, {prompts['wrong']:.1%} are wrong"
        ),
        "`1, 2, 3,` is counted on to": f"**{counting[COUNTING[0]]}** (target 30)",
        "prompts of three numbers that are counted on for 27 more": f"{counted} of {len(counting)}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    openings = "\n".join(
        f"| `{opening}` | "
        + " | ".join(str(counts.get(kind, 0)) for kind in ("parses", "unfinished", "wrong"))
        + " |"
        for opening, counts in prompts["each"].items()
    )
    shown = "\n\n".join(
        f"```text\n{prompt}⟨{answer}⟩\n```" for prompt, answer in found["samples"].items()
    )
    return (
        f"| | |\n|---|---|\n{table}\n\n"
        f"| opening | parses | unfinished | wrong |\n|---|---|---|---|\n{openings}\n\n"
        f"Samples: one draw a prompt at temperature 0.8, {ANSWER} tokens, all from seed "
        f"{SAMPLES_SEED}; the model's words stand between ⟨ and ⟩.\n\n{shown}\n"
    )


def _start(prompt: str) -> int:
    return int(prompt.split(",")[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.default.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    parser.add_argument("--card", action="store_true", help="write evaluation.json and README.md")
    chosen = parser.parse_args()
    found = evaluate(chosen.folder)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if chosen.card:
        training = json.loads((chosen.folder / "corpus.json").read_text())
        training["bytes_per_token"] = found["held_out_files"]["bytes_per_token"]
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (chosen.folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        readme = chosen.folder / "README.md"
        written = MARK.sub(
            lambda m: m[1] + card(found, training) + m[2], readme.read_text(encoding="utf-8")
        )
        readme.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
