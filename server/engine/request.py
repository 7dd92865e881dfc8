"""What is asked, and what is answered: plain data that crosses the process boundary as msgpack."""

from typing import Literal

import msgspec

from model.sampling import Sampling

Finish = Literal["stop", "length", "error", "cancelled"]


class Beams(msgspec.Struct, frozen=True, kw_only=True):
    """A beam search; the semantics are transformers' `generate`."""

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    exact_exit: bool = True  # stop as soon as the answer is certain, which changes steps only
    groups: int = 1  # diverse beams
    diversity_penalty: float = 0.0
    sample: bool = False  # draw the candidates (beam_sample) instead of taking the best
    mode: Literal["committed", "final", "windowed"] = "committed"
    window: int = 0  # windowed: the longest lag, in tokens; the result is then not exact
    tree: bool = False  # also tell how the search grows


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and everything that decides its continuations. Checked before it is made."""

    id: str  # unique in this server, not the client's
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    n: int = 1  # branches asked for
    beams: Beams | None = None
    stop: tuple[str, ...] = ()  # strings; stop ids are in sampling.stops
    eos: tuple[int, ...] = ()  # the part of sampling.stops whose text is never shown
    include_stop: bool = False  # the stop string or id stays in the text
    skip_special: bool = True  # special tokens have no text
    logprobs: int | None = None  # alternatives beside each chosen token; None: none at all
    prompt_logprobs: int | None = None
    draft: int | None = None  # the most tokens guessed ahead; None: the server's default
    priority: int = 0  # smaller goes first
    deadline: float | None = None  # seconds from arrival until it fails, wherever it is
    queue_timeout: float | None = None  # seconds it may wait for its first step
    cache_salt: str = ""  # prompts share pages only under the same salt


class Choice(msgspec.Struct, kw_only=True, omit_defaults=True, array_like=True):
    """What one step added to one branch."""

    index: int  # of the branch, 0 … n-1
    tokens: list[int] = []
    text: str = ""
    logprobs: list[float] = []  # of tokens, when asked for
    ranks: list[int] = []
    top: list[list[tuple[int, float]]] = []  # a token: its best rivals, falling
    finish: Finish | None = None
    stop: int | str | None = None  # the id or string that ended it
    score: float | None = None  # beams: its final score …
    cumulative_logprob: float | None = None  # … and the sum it was made of


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step means for one request. The last has `done`, and nothing follows it."""

    id: str
    choices: list[Choice] = []
    done: bool = False
    error: str | None = None  # a sentence; the request failed
    code: str | None = None  # and its word, for the API: see server/errors.py
    prompt_tokens: int = 0  # with the first event
    cached_tokens: int = 0  # of them, found in pages; with the first event
    queued: float = 0.0  # seconds that it waited for its first step; with the first event
    prompt_logprobs: list[tuple[float, int, list[tuple[int, float]]] | None] = []
    # with the first event, when asked for: (logprob, rank, best rivals); the first token has none
    beam_rows: int = 0  # rows computed for beams, with the last event
    tree: bytes = b""  # a step of the beam tree, JSON, when asked for


class Stats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The engine in numbers: what is now, then what has been since it started."""

    waiting: int = 0  # requests in the queue
    running: int = 0  # requests with at least one step behind them, not finished
    pages: int = 0  # all there are = live + cached + free
    page_size: int = 0  # tokens
    live: int = 0  # pages that a running request reads
    cached: int = 0  # pages that nobody reads, kept for the next equal prefix
    free: int = 0

    steps: int = 0
    step_tokens: int = 0  # computed by those steps
    step_sizes: list[int] = []  # how many steps had up to 1, 2, 4, 8, … tokens, each counted once
    prompt_tokens: int = 0  # of accepted requests, once each
    output_tokens: int = 0  # sampled and given out
    cache_queries: int = 0  # prompt tokens looked up in the prefix cache …
    cache_hits: int = 0  # … and found there
    drafted: int = 0  # tokens guessed ahead …
    accepted: int = 0  # … and right
    preemptions: int = 0
    recomputed: int = 0  # tokens computed again after preemption or a failed step
    retries: int = 0  # steps that raised and were tried again
    nan_rows: int = 0
    finished: dict[str, int] = {}  # by the last branch's finish: stop, length, cancelled, error
    aborted: dict[str, int] = {}  # cancelled or failed, by where it was: queue, prefill, decode
    rejected: dict[str, int] = {}  # refused at the door, by the error's code
