"""Two ways to ask: the engine in this process, and a server of our own on loopback."""

import asyncio
import gc
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import processes
from benchmarks.clients import Crowd, Inside, Outside, Prompt
from benchmarks.costs import Costs
from benchmarks.served import served
from model.quantize import FORMATS
from server import Engine
from server.settle import settle


@dataclass(frozen=True)
class Way:
    crowd: Callable[[Sequence[Prompt], int], Crowd]
    computed: Callable[[], float]  # seconds of CPU time, of this process or of the server's
    peak: Callable[[], int]  # bytes of memory


@contextmanager
def offline(options: Namespace, shared: bool = False) -> Iterator[Way]:
    engine = load(options, shared)
    settle()  # as the server does
    crowd = partial(Inside, engine)
    yield Way(crowd, time.process_time, partial(processes.peak, os.getpid()))
    gc.unfreeze()


@contextmanager
def http(options: Namespace, shared: bool = False) -> Iterator[Way]:
    flags = ["--prefix-cache" if shared else "--no-prefix-cache", "--quantize", options.quantize]
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        begun = served(options, *flags, "--threads", str(options.threads))
        server = runner.run(stack.enter_async_context(begun))
        try:
            yield Way(partial(Outside, server.port), lambda: sum(server.computed()), server.peak)
        finally:
            runner.run(stack.aclose())


WAYS = {"offline": offline, "http": http}


def load(options: Namespace, shared: bool = False) -> Engine:
    return Engine(
        options.model, threads=options.threads, quantize=options.quantize, prefix_cache=shared
    )


@dataclass(frozen=True)
class About:
    """What must be known of a network before it is asked."""

    costs: Costs
    vocabulary: int
    context: int
    seats: int
    step_tokens: int
    facts: dict[str, Any]

    @classmethod
    def of(cls, options: Namespace) -> "About":
        engine = load(options)
        return cls(
            costs=Costs.of(engine),
            vocabulary=engine.parts.ready.config.vocabulary,
            context=engine.info["context"],
            seats=engine.options.seats,
            step_tokens=engine.options.budget,
            facts={name: engine.info[name] for name in FACTS},
        )

    def __str__(self) -> str:
        costs, facts = self.costs, self.facts
        count, weights = facts["parameters"] / 1e6, costs.width * (costs.layers + costs.head) / 1e6
        return (
            f"Model {facts['model']}: {count:,.1f} million parameters in {facts['weights']}; a "
            f"step reads {weights:,.0f} MB of them, and {costs.kept:,} bytes for each token of "
            "context."
        )


FACTS = "model", "parameters", "dtype", "weights", "quantize"


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="a folder or hub name; nothing: the embedded one")
    add("--over", nargs="+", choices=WAYS, default=list(WAYS))
    add("--quantize", choices=["none", *FORMATS], default="none")
    add("--rounds", type=int, default=3)
