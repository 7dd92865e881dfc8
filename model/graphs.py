"""A decode step as one CUDA graph: embed to drawn token, replayed without the host in between.

A graph is recorded for a rung of row counts and of context lengths, with or without pages that
rows share, the first time it is wanted; fewer rows are padded with rows that write nowhere and sit
in a seat of their own. Steps that do more (prompts, drafts, beams, penalties, masks) run kernel by
kernel.

Off CUDA the same padding and the same buffers can be rehearsed by calling instead of replaying.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.sampling import sample, uniform_bits
from kernels.sharing import Shared
from model.batch import Batch
from model.cache import Cache, Rows
from model.decoder import Decoder
from model.seats import Seats

RUNGS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SHORTEST = 512  # tokens of context of the first rung; each next is twice as long
TOKENS, SEATS, POSITIONS, LENGTHS, SLOTS, BITS = range(6)

Found = dict[str, Tensor]


@dataclass
class Recorded:
    """The buffers a graph reads, what it leaves, and how to run it again."""

    numbers: Tensor  # [6, rows] int64
    settings: Tensor  # [rows, 5] float32
    table: Tensor  # [rows, widest] int32
    shared: Tensor | None  # [4, rows + 1] int32, the parts of a `Shared`
    found: Found
    replay: Callable[[], object]


class Graphs:
    def __init__(self, decoder: Decoder, cache: Cache, seats: Seats, last: Tensor) -> None:
        """last [seats + 1]: the last is where padding sits."""
        self.decoder, self.cache, self.seats, self.last = decoder, cache, seats, last
        self.device = cache.pages.device
        self.recorded: dict[tuple[int, int, bool], Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def fits(self, batch: Batch) -> bool:
        """One token a row, each with a successor to draw, and nothing but the draw to do."""
        rows = len(batch.seats)
        return (
            len(batch.tokens) == rows <= RUNGS[-1]
            and np.array_equal(batch.sample_at, np.arange(rows))
            and np.array_equal(batch.sample_seat, batch.seats)
            and not (len(batch.score_at) or len(batch.beam_at) or len(batch.mask_at))
            and self.seats.plain(batch.seats)
        )

    def run(self, batch: Batch, shared: Shared | None) -> Found:
        """hidden, logits and tokens of the batch's rows."""
        rows = len(batch.seats)
        rung = next(rung for rung in RUNGS if rung >= rows)
        reach = SHORTEST
        while reach < batch.lengths.max():
            reach *= 2
        kind = rung, reach, shared is not None
        step = self.recorded.get(kind) or self._record(*kind)
        self._fill(step, batch)
        if step.shared is not None and shared is not None:
            self._up(step.shared, _padded(shared, step.shared.shape))
        step.replay()
        return {name: value[:rows] for name, value in step.found.items()}

    def _fill(self, step: Recorded, batch: Batch) -> None:
        """The host's numbers, padded, in one copy each."""
        rows, size = len(batch.seats), self.cache.page_size
        positions = batch.lengths - 1
        pages = batch.page_table[np.arange(rows), positions // size].astype(np.int64)
        numbers = np.zeros(step.numbers.shape, np.int64)
        numbers[SEATS], numbers[LENGTHS], numbers[SLOTS] = len(self.last) - 1, 1, -1
        numbers[TOKENS, :rows] = batch.tokens
        numbers[SEATS, :rows] = batch.seats
        numbers[POSITIONS, :rows] = positions
        numbers[LENGTHS, :rows] = batch.lengths
        numbers[SLOTS, :rows] = pages * size + positions % size
        numbers[BITS, :rows] = uniform_bits(self.seats.keys[batch.seats], positions + 1)
        self._up(step.numbers, numbers)
        self._up(step.settings[:rows], self.seats.settings[batch.seats])
        self._up(step.table[:rows, : batch.page_table.shape[1]], batch.page_table)

    def _up(self, room: Tensor, array: npt.NDArray[Any]) -> None:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        # A pinned copy of its own, since the step before may not have read its numbers yet.
        room.copy_(tensor.pin_memory() if room.is_cuda else tensor, non_blocking=True)

    def _record(self, rung: int, reach: int, sharing: bool) -> Recorded:
        numbers = torch.zeros(6, rung, dtype=torch.int64, device=self.device)
        numbers[SEATS], numbers[LENGTHS], numbers[SLOTS] = len(self.last) - 1, 1, -1
        settings = torch.zeros(rung, 5, device=self.device)
        width = -(-reach // self.cache.page_size)
        table = torch.zeros(rung, width, dtype=torch.int32, device=self.device)
        starts = torch.arange(rung + 1, dtype=torch.int32, device=self.device)
        shared = torch.zeros(4, rung + 1, dtype=torch.int32, device=self.device)
        groups = _parts(shared) if sharing else None
        found: Found = {}

        def step() -> None:
            found.update(self._step(numbers, settings, table, starts, reach, groups))

        made = Recorded(numbers, settings, table, shared if sharing else None, found, step)
        self.recorded[rung, reach, sharing] = made
        if self.device.type == "cuda":
            made.replay = self._capture(step)
        return made

    def _capture(self, step: Callable[[], None]) -> Callable[[], object]:
        """Padding only: what is computed while recording touches nobody's pages or seat."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # kernels are compiled, and libraries take their workspaces
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        return graph.replay

    def _step(
        self,
        numbers: Tensor,
        settings: Tensor,
        table: Tensor,
        starts: Tensor,
        reach: int,
        shared: Shared | None,
    ) -> Found:
        tokens, seats, positions, lengths, slots, bits = numbers.unbind()
        rows = Rows(positions, starts, 1, reach, lengths.int(), table, slots=slots, shared=shared)
        tokens = torch.where(tokens < 0, self.last[seats], tokens)
        hidden = self.decoder(tokens, rows, self.cache)
        logits = self.decoder.logits(hidden)
        drawn = sample(logits, bits, settings)
        self.last[seats] = drawn.clamp(min=0)
        return {"hidden": hidden, "logits": logits, "tokens": drawn}


def _parts(room: Tensor) -> Shared:
    """room [4, rows + 1] as groups of at least two rows, as many as there can be"""
    rows = room.shape[1] - 1
    most = rows // 2
    return Shared(room[0, :rows], room[1, : most + 1], room[2, :most], room[3, :rows])


def _padded(shared: Shared, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """For that room; groups that are not there begin and end after the last."""
    room = np.zeros(shape, np.int32)
    room[1] = len(shared.rows)
    for line, part in zip(room, shared, strict=True):
        line[: len(part)] = part.numpy()
    return room
