"""`Batch`, the one type that the server hands down, and `Output`, the one that comes back.

A step has *rows*: a row is one sequence's share, some tokens still to compute after some already
in pages. One token is decode, many are prefill, one and some guesses are verification; nothing
else tells them apart. What is wanted from the logits is a list of its own, so that one prompt
can be sampled eight times, and a chunk in the middle of a prompt not at all.

A *seat* is where a branch's sampling state lives between steps (parameters, seen tokens, the
last sample). The scheduler gives seats out; the runner keeps what sits in them on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from model.sampling import Sampling

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

LAST_SAMPLE = -1  # in Batch.tokens: the token that this row's seat sampled last, wherever it is


@dataclass(slots=True)
class Seat:
    """A branch takes a seat: everything its draws depend on. Replaces whoever sat there."""

    seat: int
    sampling: Sampling
    branch: int  # number of the branch in its request; the draw is a function of
    # (seed, branch, position)
    prompt: list[int]  # what penalties look back on; empty when nothing looks back
    output: list[int]
    start: int = 0  # the prompt's length, always: where the first draw is, for min_tokens


@dataclass(slots=True)
class Batch:
    """One step. All arrays are numpy on the host; the runner uploads them."""

    tokens: Ints  # [tokens] ids, rows one after another; LAST_SAMPLE: ask the row's seat
    starts: Ints  # [rows + 1] where each row's tokens begin
    lengths: Ints  # [rows] context after this step: tokens in pages before + tokens of this step
    page_table: Ints  # [rows, widest] pages in order; unused entries are 0
    seats: Ints  # [rows] the seat that LAST_SAMPLE refers to; its history grows by the row's tokens
    # at positions that it does not know yet (computing a prompt, or again, teaches it nothing)

    # What is wanted of the logits.
    sample_at: Ints  # [samples] index into tokens: the successor of this token is drawn
    sample_seat: Ints  # [samples] with this seat's parameters, and kept as this seat's last sample
    score_at: Ints  # [scores] index into tokens: the log-probability of …
    score_token: Ints  # [scores] … this token as its successor (prompt log-probabilities)
    beam_at: Ints  # [beams] index into tokens: the best successors by log-probability
    beam_seat: Ints  # [beams] with this seat's penalties and masks
    beam_width: int = 0  # how many successors each of beam_at wants
    top: int = 0  # how many alternatives to list for samples and scores (the largest anyone wants)
    logprobs: bool = True  # False: nobody wants log-probabilities of samples; Output has zeros

    # What may be drawn, or be a beam's successor, besides what the seat says.
    mask_at: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    # [masks] index into tokens, rising: only these ids may follow this token …
    masks: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    # [masks, ⌈vocabulary / 32⌉] … as bits, the lowest first

    copies: Ints = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    # [copies, 3] from page, to page, slots: done before anything of this step is written
    taken: list[Seat] = field(default_factory=list)  # done first
    forks: Ints = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    # [forks, 2] from seat, to seat: copies of state, all read before any is written; done second


@dataclass(slots=True)
class Output:
    """What a step found, on the host. Log-probabilities of samples and scores are the model's own,
    before any penalty, mask or temperature; those of beams are after penalties and masks."""

    tokens: Ints  # [samples]
    logprobs: Floats  # [samples] of the drawn token
    ranks: Ints  # [samples] 1 = the likeliest
    top_tokens: Ints  # [samples, top]
    top_logprobs: Floats  # [samples, top]
    score_logprobs: Floats  # [scores]
    score_ranks: Ints  # [scores]
    score_top_tokens: Ints  # [scores, top]
    score_top_logprobs: Floats  # [scores, top]
    beam_tokens: Ints  # [beams, beam_width] best first; ties: the smaller id first
    beam_logprobs: Floats  # [beams, beam_width]
    bad: Ints  # [rows] 1 where the row's logits were not numbers: that request fails, no other;
    # for a row that wants no logits, its last token's hidden state (its pages will be published)


class Executor(Protocol):
    """What the engine drives: the runner, or the simulation's stand-in for it."""

    def launch(self, batch: Batch) -> Callable[[], Output]:
        """Begin a step and return at once; call what is returned to wait for the result.

        A batch may be launched before the one before it was waited for (its tokens are then
        LAST_SAMPLE); results are waited for in order.
        """
        ...
