"""What the person who starts Kvist can decide, once: `Settings`, and its caps: `Limits`.

A field here is a flag (`--step-tokens`), a variable (`KVIST_STEP_TOKENS`) and a key of the settings
file (`step-tokens`), with its help; `options.py` makes them. The caps are `--limit-n` and so on.
"""

# ruff: noqa: RUF009 (`option` makes a field, as `field` does)

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Bounds:
    """The numbers that make sense; others end the start with a sentence."""

    least: float
    most: float
    open: bool = False  # the least itself is too little

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.open else value >= self.least
        return low and value <= self.most

    def __str__(self) -> str:
        words = ("above {} and at most {}", "from {} to {}")[not self.open]
        return words.format(self.least, self.most)


@dataclass(frozen=True)
class Form:
    """The texts that make sense, as a pattern and in words."""

    pattern: str
    words: str

    def __contains__(self, value: object) -> bool:
        return re.fullmatch(self.pattern, str(value)) is not None

    def __str__(self) -> str:
        return self.words


FOLDER = Form(r"[^\x00]*[^\s\x00][^\x00]*", "a folder")
ANY = Form(r"[^\x00]*[^\s\x00][^\x00]*", "not empty")
GIB, DAY, MANY = 1 << 30, 86_400, 1 << 20


def option(
    default: Any, group: str, help: str, *also: str, within: "Bounds | Form | None" = None
) -> Any:
    """A field; `also` are flags of other servers that mean the same."""
    return field(
        default=default,
        metadata={"group": group, "help": help, "also": also, "within": within or ANY},
    )


def limit(default: int, least: int, most: int, help: str) -> Any:
    return option(default, "limits", help, within=Bounds(least, most))


def seconds(default: float, help: str) -> Any:
    """A limit in time; none at all would end everything before it begins."""
    return option(default, "limits", help, within=Bounds(0, DAY, open=True))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The caps, in one place. What is above them is refused before anything is done for it."""

    body_bytes: int = limit(4 << 20, 2, GIB, "largest request body")
    header_bytes: int = limit(64 << 10, 256, GIB, "largest sum of a request's headers")
    headers: int = limit(100, 4, MANY, "most headers of a request")
    url_bytes: int = limit(8 << 10, 64, MANY, "longest URL")
    json_depth: int = limit(64, 4, 512, "deepest nesting of a body")
    receive_timeout: float = seconds(30.0, "seconds for a request to arrive whole")
    idle_timeout: float = seconds(30.0, "seconds that an unused connection stays open")
    connections: int = limit(4096, 1, MANY, "most open connections")

    prompts: int = limit(128, 1, MANY, "most prompts of a request")
    n: int = limit(128, 1, MANY, "most choices of a prompt")
    branches: int = limit(1024, 1, MANY, "largest product of prompts and choices or beams")
    beam_width: int = limit(16, 1, 1024, "widest beam search")
    stop: int = limit(4, 0, 1024, "most stop strings of a request")
    stop_bytes: int = limit(256, 1, MANY, "longest stop string")
    stop_ids: int = limit(128, 0, MANY, "most stop ids, and most bad words, of a request")
    logprobs: int = limit(20, 0, 1024, "most alternatives listed beside a token")
    logit_bias: int = limit(1024, 0, MANY, "most tokens with a bias")
    messages: int = limit(4096, 1, MANY, "most messages of a chat")

    template_seconds: float = seconds(1.0, "longest rendering of a chat template")
    template_bytes: int = limit(1 << 20, 1, GIB, "largest text that a chat template makes")
    unread_events: int = limit(256, 1, MANY, "most events that a client may lag behind")
    unread_seconds: float = seconds(30.0, "longest time that a client may read nothing")
    request_timeout: float = seconds(600.0, "seconds until a request fails, wherever it is")
    queue_timeout: float = seconds(300.0, "seconds that a request may wait for its first step")
    queue_requests: int = limit(1024, 1, MANY, "most requests that wait; above it, 429")
    queue_factor: float = option(
        4.0,
        "limits",
        "most tokens that wait, in multiples of the KV cache's",
        within=Bounds(0, 1e6, open=True),
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything else. Nothing changes it after the start; keys alone can be read again."""

    model: str | None = option(None, "model", "a folder or hub name; nothing: the embedded model")
    served_name: tuple[str, ...] = option(
        (), "model", "the model's names in the API (the folder's name)", "--served-model-name"
    )
    tokenizer: Path | None = option(
        None, "model", "a folder, when it is not the model's", within=FOLDER
    )
    chat_template: Path | None = option(None, "model", "a Jinja file, instead of the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "model",
        "precision of products; on a CPU, float32 leaves 16-bit weights as they are",
    )
    quantize: Literal["none", "int8", "int4", "fp8"] = option(
        "none", "model", "store the weights in fewer bits", "--quantization"
    )
    context: int | None = option(
        None,
        "model",
        "longest prompt + answer, in tokens (the model's own)",
        "--max-model-len",
        within=Bounds(2, 1 << 24),
    )

    device: str = option(
        "auto",
        "engine",
        "cuda, cuda:1, cpu; auto: a GPU when there is one",
        within=Form(r"auto|cpu|cuda(:\d{1,2})?", "auto, cpu, cuda or cuda:1"),
    )
    kernels: Literal["auto", "triton", "reference"] = option(
        "auto", "engine", "which way the kernels run; auto: the best that is proven here"
    )
    threads: int = option(0, "engine", "CPU threads; 0: one per core", within=Bounds(0, 1024))
    memory: float = option(
        0.9,
        "engine",
        "share of the GPU's memory to use",
        "--gpu-memory-utilization",
        within=Bounds(0, 1, open=True),
    )
    pages: int | None = option(
        None, "engine", "KV pages, instead of as many as fit", within=Bounds(1, (1 << 31) - 1)
    )
    page_size: int = option(
        16, "engine", "tokens in a page", "--block-size", within=Bounds(1, 1024)
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = option(
        "auto",
        "engine",
        "what KV pages hold; auto: as computed, with int8 weights bfloat16 if the CPU has it",
        "--kv-cache-dtype",
    )
    rows: int = option(
        256, "engine", "most sequences in a step", "--max-num-seqs", within=Bounds(1, 1 << 16)
    )
    step_tokens: int | None = option(
        None,
        "engine",
        "most tokens in a step (a GPU: 2048, a CPU: 512)",
        "--max-num-batched-tokens",
        within=Bounds(1, MANY),
    )
    prefix_cache: bool = option(
        True, "engine", "share pages between equal beginnings", "--enable-prefix-caching"
    )
    draft: int = option(
        0, "engine", "tokens guessed ahead from the text so far; 0: none", within=Bounds(0, 1024)
    )
    deterministic: bool = option(
        False, "engine", "logits that do not depend on who else is in the batch, bit for bit"
    )

    host: str = option("127.0.0.1", "http", "the address to listen on")
    port: int = option(
        8000, "http", "the port to listen on; 0: any free one", within=Bounds(0, 65535)
    )
    lenient: bool = option(False, "http", "warn of unknown request fields instead of refusing")
    docs: bool | None = option(
        None, "http", "serve /docs and the playground (on for a loopback address only)"
    )

    api_keys: Path | None = option(
        None, "security", "a file with one key a line; SIGHUP reads it again"
    )
    open_metrics: bool = option(False, "security", "serve /metrics without a key")
    allowed_hosts: tuple[str, ...] = option((), "security", "names that a Host header may say")
    tls_cert: Path | None = option(None, "security", "certificate chain, PEM", "--ssl-certfile")
    tls_key: Path | None = option(None, "security", "its private key, PEM", "--ssl-keyfile")

    shutdown_timeout: float = option(
        30.0,
        "life",
        "seconds that running requests get to finish after SIGTERM",
        within=Bounds(0, DAY),
    )
    drain_lag: float = option(
        0.0,
        "life",
        "seconds to keep listening after SIGTERM, so that balancers notice",
        within=Bounds(0, DAY),
    )
    log: Literal["text", "json"] = option("text", "life", "how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "life", "what is worth a line"
    )
    otlp_endpoint: str | None = option(
        None,
        "life",
        "an OpenTelemetry collector, http://…:4318, that gets traces",
        within=Form(r"https?://[^\s/]+\S*", "an address: http://… or https://…"),
    )

    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What `generate` asks of one continuation; a flag each, as above."""

    max_tokens: int = option(128, "wish", "the most new tokens", within=Bounds(0, 1 << 24))
    temperature: float = option(
        0.0, "wish", "0 takes the likeliest, 1 draws as the model says", within=Bounds(0, 2)
    )
    top_k: int = option(
        0, "wish", "draw from so many of the likeliest; 0: all", within=Bounds(-1, (1 << 31) - 1)
    )
    top_p: float = option(
        1.0, "wish", "draw from the likeliest with this share", within=Bounds(0, 1, open=True)
    )
    min_p: float = option(
        0.0, "wish", "draw from those with this share of the likeliest's", within=Bounds(0, 1)
    )
    repetition_penalty: float = option(
        1.0, "wish", "above 1 makes repetition less likely", within=Bounds(0, 100, open=True)
    )
    seed: int = option(0, "wish", "the same seed draws the same text", within=Bounds(0, 2**63 - 1))
    beams: int = option(1, "wish", "search with so many beams", within=Bounds(1, 1024))
    stop: tuple[str, ...] = ()  # a flag each time, since a text may hold a comma
