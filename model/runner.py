"""Runs batches: owns the decoder, its cache, and the seats where branches keep what they draw from.

A step never waits for the device: `launch` uploads, computes and starts the download, and what
it returns waits. A token sampled in one step is the next step's input without leaving the device.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.pages import copy_pages
from kernels.topk import top_logprobs
from model.batch import LAST_SAMPLE, Batch, Ints, Output
from model.cache import Cache, Rows
from model.decoder import Decoder
from model.sampling import Seats

INTS = torch.int32
FLOATS = {"logprobs", "top_logprobs", "score_logprobs", "score_top_logprobs", "beam_logprobs"}
EMPTY: dict[str, Any] = {
    field.name: np.zeros(0, np.float32 if field.name in FLOATS else np.int32)
    for field in fields(Output)
}
LOGIT_ROWS = 256  # of prompts' log-probabilities at once: 155 MB at a vocabulary of 152k


class Runner:
    """The `Executor` of a real network."""

    def __init__(self, decoder: Decoder, cache: Cache, seats: int) -> None:
        self.decoder, self.cache = decoder, cache
        self.device = cache.pages.device
        self.seats = Seats(seats, decoder.config.vocabulary, self.device)
        self.last = torch.zeros(seats, dtype=torch.int64, device=self.device)  # sampled, by seat

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Callable[[], Output]:
        for seat in batch.taken:
            self.seats.take(seat)
        if len(batch.forks):
            self.seats.fork(self._up(batch.forks))
        if len(batch.copies):
            copy_pages(self.cache.pages, self._up(batch.copies))
        rows = self._rows(batch)
        tokens, owners = self._tokens(batch)
        self.seats.feed(owners, tokens)
        hidden = self.decoder(tokens, rows, self.cache)
        found = self._sample(batch, hidden, rows) | self._score(batch, hidden)
        found |= self._beams(batch, hidden, rows)
        found["bad"] = hidden[rows.starts[1:].long() - 1].isnan().any(-1)
        return self._down(found)

    def _up(self, array: Ints) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _rows(self, batch: Batch) -> Rows:
        """Positions and slots are computed here, for all tokens at once."""
        counts = np.diff(batch.starts)
        row = np.repeat(np.arange(len(counts)), counts)  # [tokens]
        within = np.arange(len(batch.tokens)) - batch.starts[:-1][row]
        positions = (batch.lengths - counts)[row] + within
        size = self.cache.page_size
        pages = batch.page_table[row, positions // size].astype(np.int64)
        return Rows(
            positions=self._up(positions),
            starts=self._up(batch.starts),
            longest_query=int(counts.max()),
            longest_context=int(batch.lengths.max()),
            lengths=self._up(batch.lengths),
            page_table=self._up(batch.page_table),
            slots=self._up(pages * size + positions % size),
        )

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids [tokens], the unknown ones from where they were sampled, and each one's seat."""
        owners = self._up(np.repeat(batch.seats, np.diff(batch.starts)).astype(np.int64))
        tokens = self._up(batch.tokens).long()
        if (batch.tokens == LAST_SAMPLE).any():
            tokens = torch.where(tokens < 0, self.last[owners], tokens)
        return tokens, owners

    def _sample(self, batch: Batch, hidden: Tensor, rows: Rows) -> dict[str, Tensor]:
        if not len(batch.sample_at):
            return {}
        at, seats = self._up(batch.sample_at).long(), self._up(batch.sample_seat).long()
        logits = self.decoder.logits(hidden[at])
        tokens = self.seats.sample(logits, seats, rows.positions[at] + 1)
        self.last[seats] = tokens
        found = {"tokens": tokens}
        if batch.logprobs:
            names = ("top_logprobs", "top_tokens", "logprobs", "ranks")
            found |= zip(names, top_logprobs(logits, batch.top, tokens), strict=True)
        return found

    def _score(self, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
        """Prompts' log-probabilities, some rows of logits at a time."""
        if not len(batch.score_at):
            return {}
        at, chosen = self._up(batch.score_at).long(), self._up(batch.score_token).long()
        parts = [
            top_logprobs(self.decoder.logits(hidden[some]), batch.top, tokens)
            for some, tokens in zip(at.split(LOGIT_ROWS), chosen.split(LOGIT_ROWS), strict=True)
        ]
        names = ("score_top_logprobs", "score_top_tokens", "score_logprobs", "score_ranks")
        return {name: torch.cat(some) for name, some in zip(names, zip(*parts, strict=True))}

    def _beams(self, batch: Batch, hidden: Tensor, rows: Rows) -> dict[str, Tensor]:
        """The best successors of each beam's row, after penalties and masks."""
        if not len(batch.beam_at):
            return {}
        at, seats = self._up(batch.beam_at).long(), self._up(batch.beam_seat).long()
        logits = self.decoder.logits(hidden[at])
        best, tokens = self.seats.best(logits, seats, rows.positions[at] + 1, batch.beam_width)
        return {"beam_tokens": tokens, "beam_logprobs": best}

    def _down(self, found: dict[str, Tensor]) -> Callable[[], Output]:
        """Everything to the host in the background; the rest of `Output` is empty."""
        landed = {
            name: tensor.to("cpu", INTS if name not in FLOATS else None, non_blocking=True)
            for name, tensor in found.items()
        }
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()

        def wait() -> Output:
            if event is not None:
                event.synchronize()
            return Output(**EMPTY | {name: tensor.numpy() for name, tensor in landed.items()})

        return wait
