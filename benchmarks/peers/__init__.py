"""Other engines, each behind the same two verbs: write its own format, and generate.

`NAME.py` of an engine has `write(source, folder, form)` and a class `Peer`, and is imported only in
the engine's own process: threads and memory of several do not get along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Entry:
    """What must be installed, and how an engine calls each precision."""

    package: str
    forms: Mapping[str, tuple[str, ...]]
    converts: bool = True  # or reads the source's folder as it is
    tells: bool = True  # its tokens, as ids; over HTTP texts go in, and only numbers come out


PRECISIONS = ("int4", "int8", "float32")  # of the weights
BOTH = {"float32": ("float32",), "int8": ("int8",)}
ALL = {name: (name,) for name in PRECISIONS}
PEERS = {
    "kvist": Entry("torch", ALL, converts=False),
    "kvist_http": Entry("uvicorn", ALL, converts=False, tells=False),
    "transformers": Entry("transformers", {"float32": ("float32",)}, converts=False),
    "transformers_http": Entry(
        "transformers", {"float32": ("float32",)}, converts=False, tells=False
    ),
    "continuous": Entry("transformers", {"float32": ("float32",)}, converts=False),
    "ctranslate2": Entry("ctranslate2", BOTH),
    "llama_cpp": Entry(
        "llama-cpp-python",
        {
            "float32": ("F32", "BF16"),
            "int8": ("Q8_0", "Q4_0"),  # its fastest, in two
            "int4": ("Q4_0",),
        },
    ),
    "openvino": Entry("openvino-genai", ALL),
    "onnxruntime": Entry("onnxruntime-genai", BOTH),
}
CONTEXT = 1280  # tokens of prompt and output that every engine has room for
STREAMS = 16  # at once


@dataclass(frozen=True)
class Work:
    """Prompts of random ids, continued greedily (or by beams) to exactly `new` tokens each."""

    streams: int = 1
    prompt: int = 128
    new: int = 128
    beams: int = 1
    seed: int = 0

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """The same for every engine; the first ids are left out: some are special."""
        chance = np.random.default_rng(self.seed)
        found: list[list[int]] = chance.integers(
            8, vocabulary, (self.streams, self.prompt)
        ).tolist()
        return found


class Beyond(Exception):
    """A kind of work that an engine does not do; the message is all that is said of it."""


class Peer(Protocol):
    def __init__(self, folder: Path, form: str, threads: int) -> None: ...

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        """The new tokens of every prompt, the best beam's if there are several."""


def find(name: str) -> Any:
    """The module of an engine."""
    return import_module(f"benchmarks.peers.{name}")
