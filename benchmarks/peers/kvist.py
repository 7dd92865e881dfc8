"""Kvist itself: the offline engine, with the scheduler, pages and spelling of the server's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import CONTEXT, STREAMS
from model.sampling import Sampling
from server import Engine
from server.engine.request import Beams


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        self.engine = Engine(
            str(folder),
            threads=threads,
            dtype="float32",
            quantize="none" if form == "float32" else form,
            rows=STREAMS,
            pages=STREAMS * CONTEXT // 16,
            prefix_cache=False,
        )

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        more: dict[str, Any] = {}
        if beams > 1:
            more["beams"] = Beams(width=beams, exact_exit=False)
        greedy = Sampling() if more else Sampling(temperature=0)
        said = self.engine.generate(
            prompts, max_tokens=new, sampling=greedy, ignore_eos=True, progress=False, **more
        )
        return [list(event.choices[0].tokens) for event in said]
