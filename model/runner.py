"""Runs batches: owns the decoder, its cache, and the seats where branches keep what they draw from.

A step never waits for the device: `launch` uploads, computes and starts the download, and what
it returns waits. A token sampled in one step is the next step's input without leaving the device.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.attention import shares_reads
from kernels.sharing import Shared, find_shared
from kernels.topk import top_logprobs
from model.batch import LAST_SAMPLE, Batch, Ints, Output
from model.cache import Cache, Rows
from model.decoder import Decoder
from model.graphs import Graphs
from model.seats import Masks, Seats

INTS = torch.int32
FLOATS = {"logprobs", "top_logprobs", "score_logprobs", "score_top_logprobs", "beam_logprobs"}
EMPTY: dict[str, Any] = {
    field.name: np.zeros(0, np.float32 if field.name in FLOATS else np.int32)
    for field in fields(Output)
}
LOGIT_ROWS = 256  # of prompts' log-probabilities at once: 155 MB at a vocabulary of 152k


class Runner:
    """The `Executor` of a real network."""

    def __init__(
        self, decoder: Decoder, cache: Cache, seats: int, graphs: bool | None = None
    ) -> None:
        """graphs: decode by CUDA graphs, or rehearse it elsewhere; None: where there is CUDA."""
        self.decoder, self.cache = decoder, cache
        self.device = cache.pages.device
        self.seats = Seats(seats, decoder.config.vocabulary, self.device)
        # What each seat sampled last, and a seat for padding.
        self.last = torch.zeros(seats + 1, dtype=torch.int64, device=self.device)
        wanted = self.device.type == "cuda" if graphs is None else graphs
        self.graphs = Graphs(decoder, cache, self.seats, self.last) if wanted else None

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Callable[[], Output]:
        for seat in batch.taken:
            self.seats.take(seat)
        if len(batch.forks):
            self.seats.fork(batch.forks)
        if len(batch.copies):
            self.cache.copy(self._up(batch.copies))
        if self.graphs is not None and self.graphs.fits(batch):
            return self._down(batch, self._replay(self.graphs, batch))
        row, positions = _places(batch)
        rows = self._rows(batch, row, positions)
        owners = batch.seats[row]
        tokens = self._tokens(batch, owners)
        self.seats.feed(owners, tokens, positions)
        hidden = self.decoder(tokens, rows, self.cache)
        ends = batch.starts[1:] - 1
        last = self._at(hidden, ends)
        same = np.array_equal(batch.sample_at, ends)  # as always but for drafts, beams and chunks
        drawn = last if same else self._at(hidden, batch.sample_at)
        found = self._sample(batch, drawn, positions) | self._score(batch, hidden)
        found |= self._beams(batch, hidden, positions)
        found["bad"] = last.isnan().any(-1)
        return self._down(batch, found)

    def _replay(self, graphs: Graphs, batch: Batch) -> dict[str, Tensor]:
        step = graphs.run(batch, self._shared(batch))
        found = {"tokens": step["tokens"], "bad": step["hidden"].isnan().any(-1)}
        return found | self._logprobs(batch, step["logits"], step["tokens"])

    def _up(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _indices(self, array: Ints) -> Tensor:
        """As torch wants them; made here, since there it costs a call to the device."""
        return self._up(array.astype(np.int64))

    def _rows(self, batch: Batch, row: Ints, positions: Ints) -> Rows:
        """Slots are computed here, for all tokens at once."""
        size = self.cache.page_size
        pages = batch.page_table[row, positions // size].astype(np.int64)
        shared = self._shared(batch)
        return Rows(
            positions=self._up(positions),
            starts=self._up(batch.starts),
            longest_query=int(np.diff(batch.starts).max()),
            longest_context=int(batch.lengths.max()),
            lengths=self._up(batch.lengths),
            page_table=self._up(batch.page_table),
            slots=self._up(pages * size + positions % size),
            wanted=self._wanted(batch),
            shared=shared and Shared(*(self._up(part.numpy()) for part in shared)),
        )

    def _wanted(self, batch: Batch) -> Tensor | None:
        """Most of a prompt's tokens are computed for their keys and values alone."""
        ends = batch.starts[1:] - 1
        if len(ends) == len(batch.tokens):
            return None
        parts = ends, batch.sample_at, batch.score_at, batch.beam_at
        return self._indices(np.unique(np.concatenate(parts)))

    def _shared(self, batch: Batch) -> Shared | None:
        """Beams of one group, and requests with one cached prefix; on the host."""
        if not shares_reads(self.device):
            return None
        counts = np.diff(batch.starts)
        return find_shared(counts, batch.lengths, batch.page_table, self.cache.page_size)

    def _tokens(self, batch: Batch, owners: Ints) -> Tensor:
        """Ids [tokens], the unknown ones from where they were sampled."""
        tokens = self._indices(batch.tokens)
        if (batch.tokens == LAST_SAMPLE).any():
            tokens = torch.where(tokens < 0, self.last[self._indices(owners)], tokens)
        return tokens

    def _at(self, hidden: Tensor, at: Ints) -> Tensor:
        """Some rows, maybe several times. All in their order, as when everyone decodes, are not
        copied."""
        whole = len(at) == len(hidden) and np.array_equal(at, np.arange(len(hidden)))
        return hidden if whole else hidden[self._indices(at)]

    def _sample(self, batch: Batch, hidden: Tensor, positions: Ints) -> dict[str, Tensor]:
        """hidden [len(sample_at), hidden]"""
        if not len(batch.sample_at):
            return {}
        logits = self.decoder.logits(hidden)
        at = positions[batch.sample_at] + 1
        masks = self._masks(batch, batch.sample_at)
        tokens = self.seats.sample(logits, batch.sample_seat, at, masks)
        self.last.index_copy_(0, self._indices(batch.sample_seat), tokens.clamp(min=0))
        return {"tokens": tokens} | self._logprobs(batch, logits, tokens)

    def _masks(self, batch: Batch, wanted: Ints) -> Masks | None:
        """Of the successors of these tokens."""
        if not len(batch.mask_at):
            return None
        rows = np.full(len(batch.tokens), -1)
        rows[batch.mask_at] = np.arange(len(batch.mask_at))
        return Masks(self._up(batch.masks), rows[wanted])

    def _logprobs(self, batch: Batch, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Of the drawn tokens; −1 is no id: nothing could be drawn."""
        if not batch.logprobs:
            return {}
        names = ("top_logprobs", "top_tokens", "logprobs", "ranks")
        return dict(zip(names, top_logprobs(logits, batch.top, tokens.clamp(min=0)), strict=True))

    def _score(self, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
        """Prompts' log-probabilities, some rows of logits at a time."""
        if not len(batch.score_at):
            return {}
        at, chosen = self._indices(batch.score_at), self._indices(batch.score_token)
        parts = [
            top_logprobs(self.decoder.logits(hidden[some]), batch.top, tokens)
            for some, tokens in zip(at.split(LOGIT_ROWS), chosen.split(LOGIT_ROWS), strict=True)
        ]
        names = ("score_top_logprobs", "score_top_tokens", "score_logprobs", "score_ranks")
        return {name: torch.cat(some) for name, some in zip(names, zip(*parts, strict=True))}

    def _beams(self, batch: Batch, hidden: Tensor, positions: Ints) -> dict[str, Tensor]:
        """The best successors of each beam's row, after penalties and masks."""
        if not len(batch.beam_at):
            return {}
        logits = self.decoder.logits(self._at(hidden, batch.beam_at))
        at = positions[batch.beam_at] + 1
        masks = self._masks(batch, batch.beam_at)
        best, tokens = self.seats.best(logits, batch.beam_seat, at, batch.beam_width, masks)
        return {"beam_tokens": tokens, "beam_logprobs": best}

    def _down(self, batch: Batch, found: dict[str, Tensor]) -> Callable[[], Output]:
        """Everything to the host in the background; the rest of `Output` is empty."""
        event, pinned = None, self.device.type == "cuda"
        landed = {}
        for name, tensor in found.items():
            dtype = torch.float32 if name in FLOATS else INTS
            landed[name] = torch.empty(tensor.shape, dtype=dtype, pin_memory=pinned)
            landed[name].copy_(tensor, non_blocking=True)
        if pinned:
            event = torch.cuda.Event()
            event.record()

        def wait() -> Output:
            if event is not None:
                event.synchronize()
            output = Output(**EMPTY | {name: tensor.numpy() for name, tensor in landed.items()})
            undrawn = output.tokens < 0  # masks left it nothing, or a logit was not a number
            if undrawn.any():
                row = np.searchsorted(batch.starts, batch.sample_at[undrawn], side="right") - 1
                output.bad[row] = 1
            return output

        return wait


def _places(batch: Batch) -> tuple[Ints, Ints]:
    """Each token's row and its position there, [tokens] both."""
    counts = np.diff(batch.starts)
    row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    within = np.arange(len(batch.tokens), dtype=np.int32) - batch.starts[:-1][row]
    return row, (batch.lengths - counts)[row] + within
