"""What Prometheus reads: vLLM's names, so that existing dashboards work, OpenTelemetry's, and ours.

No label comes from a client. What the engine counts is read from its stats at each scrape.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from server.engine.process import Health
from server.engine.request import Event, Stats
from server.histogram import Histogram

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
WHOLE = tuple(0.01 * 2**i for i in range(14))
TOKENS = tuple(2**i for i in range(18))
LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
Clock = Callable[[], float]
LABELS = ("model_name", "engine")
TELEMETRY = ("gen_ai_operation_name", "gen_ai_provider_name")

HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("from the request's arrival to its first token", FIRST),
    "vllm:inter_token_latency_seconds": ("between two tokens of a request", BETWEEN),
    "vllm:request_time_per_output_token_seconds": ("a request's mean time a token", BETWEEN),
    "vllm:e2e_request_latency_seconds": ("from arrival to the end", WHOLE),
    "vllm:request_queue_time_seconds": ("from arrival to the first step", WHOLE),
    "vllm:request_prefill_time_seconds": ("from the first step to the first token", WHOLE),
    "vllm:request_inference_time_seconds": ("from the first step to the last token", WHOLE),
    "vllm:request_decode_time_seconds": ("from the first token to the last", WHOLE),
    "vllm:request_prompt_tokens": ("tokens of a request's prompts", TOKENS),
    "vllm:request_generation_tokens": ("tokens that a request got", TOKENS),
    "vllm:request_params_n": ("choices asked for", (1, 2, 4, 8, 16, 32, 64, 128)),
    "vllm:request_params_max_tokens": ("the most tokens asked for", TOKENS),
}

GEN_AI = {
    "request_duration": ("from arrival to the end", WHOLE),
    "time_to_first_token": ("from arrival to the first token", FIRST),
    "time_per_output_token": ("a request's mean time a token", BETWEEN),
}


class Watched(Protocol):
    """The part of the engine's client that tells numbers."""

    info: dict[str, Any]

    @property
    def unread(self) -> int: ...
    def stats(self) -> Stats: ...
    def health(self) -> Health: ...


class Metrics:
    def __init__(self, model: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model, "0")
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._gen_ai: dict[tuple[str, str], Histogram] = {}  # by name and operation
        self.registry.register(self)
        self._finished = Counter(
            "vllm:request_success",
            "choices that ended well, by why",
            [*LABELS, "finished_reason"],
            registry=self.registry,
        )
        self._rejected = self._counter(
            "requests_rejected", "refused, by the error's code", "reason"
        )
        self.lag = prometheus_client.Histogram(
            "event_loop_lag_seconds",
            "how late the event loop was",
            buckets=LAG,
            registry=self.registry,
        )
        build = Gauge("build_info", "what runs here", ["version"], registry=self.registry)
        build.labels(version).set(1)

    def collect(self) -> Iterator[Metric]:
        """A Prometheus collector, of the histograms."""
        for name, (about, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, about, labels=LABELS)
            self._histograms[name].tell(family, self._labels)
            yield family
        for name, (about, _) in GEN_AI.items():
            family = HistogramMetricFamily(f"gen_ai_server_{name}_seconds", about, labels=TELEMETRY)
            for (of, operation), histogram in self._gen_ai.items():
                if of == name:
                    histogram.tell(family, (operation, "kvist"))
            yield family

    def _counter(self, name: str, about: str, label: str) -> Counter:
        return Counter(name, about, [label], registry=self.registry)

    def watch(self, engine: Watched) -> None:
        """From now on, tell of the engine too."""
        self.registry.register(_Engine(self._labels, engine))

    def rejected(self, code: str) -> None:
        self._rejected.labels(code).inc()

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._labels, reason).inc()

    def histogram(self, name: str) -> Histogram:
        return self._histograms[f"vllm:{name}"]

    def observe(self, name: str, value: float) -> None:
        self.histogram(name).observe(value)

    def telemetry(self, name: str, operation: str, value: float) -> None:
        key = name, operation
        if key not in self._gen_ai:
            self._gen_ai[key] = Histogram(GEN_AI[name][1])
        self._gen_ai[key].observe(value)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class Meter:
    """The times of one request, from arrival on."""

    def __init__(
        self, metrics: Metrics, operation: str, clock: Callable[[], float] = time.monotonic
    ):
        self._metrics = metrics
        self._between = metrics.histogram("inter_token_latency_seconds")
        self.operation = operation
        self._clock = clock
        self.began = self._sent = clock()
        self.first: float | None = None
        self._last = self.began
        self._computed: float | None = None  # since when the engine computes
        self.tokens = 0

    def asked(self, prompt: int, n: int, tokens: int) -> None:
        """It was read and understood, and goes to the engine."""
        self._sent = self._clock()
        self._metrics.observe("request_prompt_tokens", prompt)
        self._metrics.observe("request_params_n", n)
        self._metrics.observe("request_params_max_tokens", tokens)

    def event(self, event: Event) -> None:
        count = 0
        for choice in event.choices:
            count += len(choice.tokens)
            if choice.finish:
                self._metrics.finished(choice.finish)
        if event.prompt_tokens:  # the first of a prompt
            self._metrics.observe("request_queue_time_seconds", event.queued)
            if self._computed is None:
                self._computed = self._sent + event.queued
        if not count:
            return
        now = self._clock()
        if self.first is None:
            self.first = now
            self._metrics.observe("time_to_first_token_seconds", now - self.began)
            self._metrics.telemetry("time_to_first_token", self.operation, now - self.began)
        else:
            self._between.observe(now - self._last)
        self._last = now
        self.tokens += count

    def end(self) -> None:
        """The answer is complete."""
        whole = self._clock() - self.began
        self._metrics.observe("e2e_request_latency_seconds", whole)
        self._metrics.telemetry("request_duration", self.operation, whole)
        self._metrics.observe("request_generation_tokens", self.tokens)
        if self.first is not None and self._computed is not None:
            decode, prefill = self._last - self.first, max(0.0, self.first - self._computed)
            self._metrics.observe("request_prefill_time_seconds", prefill)
            self._metrics.observe("request_inference_time_seconds", prefill + decode)
            each = decode / max(1, self.tokens - 1)
            self._metrics.observe("request_decode_time_seconds", decode)
            self._metrics.observe("request_time_per_output_token_seconds", each)
            self._metrics.telemetry("time_per_output_token", self.operation, each)


class _Engine:
    """A Prometheus collector: the engine's own numbers, read when they are asked for."""

    def __init__(self, labels: tuple[str, str], engine: Watched) -> None:
        self._labels = labels
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats, health = self._engine.stats(), self._engine.health()
        used = (stats.live / stats.pages) if stats.pages else 0.0
        yield self._gauge("vllm:num_requests_running", "requests in the batch", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "requests in the queue", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "share of KV pages in use, 0 … 1", used)
        for name, about, value in (
            ("vllm:prompt_tokens", "prompt tokens of accepted requests", stats.prompt_tokens),
            ("vllm:generation_tokens", "tokens generated", stats.output_tokens),
            ("vllm:num_preemptions", "requests set back for want of pages", stats.preemptions),
            ("vllm:prefix_cache_queries", "prompt tokens looked up", stats.cache_queries),
            ("vllm:prefix_cache_hits", "prompt tokens found in pages", stats.cache_hits),
            ("vllm:spec_decode_num_draft_tokens", "tokens guessed ahead", stats.drafted),
            ("vllm:spec_decode_num_accepted_tokens", "guesses that were right", stats.accepted),
        ):
            yield self._many(CounterMetricFamily, name, about, [(self._labels, value)], LABELS)
        yield self._sizes(stats)
        yield from self._ours(stats, health)

    def _sizes(self, stats: Stats) -> Metric:
        """How many tokens the steps had."""
        sums = list(accumulate(stats.step_sizes))
        buckets = [(f"{float(1 << i)}", count) for i, count in enumerate(sums)]
        buckets.append(("+Inf", stats.steps))
        name, about = "vllm:iteration_tokens_total", "tokens of a step"
        family = HistogramMetricFamily(name, about, labels=LABELS)
        family.add_metric(self._labels, buckets, stats.step_tokens)
        return family

    def _ours(self, stats: Stats, health: Health) -> Iterator[Metric]:
        yield self._gauge("vllm:engine_healthy", "1 when the engine can serve", health.ready)
        states = [(("live",), stats.live), (("cached",), stats.cached), (("free",), stats.free)]
        yield self._many(GaugeMetricFamily, "pages", "KV pages", states, ("state",))
        about = "seconds since the engine's last sign of life"
        yield self._one(GaugeMetricFamily, "engine_heartbeat_age_seconds", about, health.age)
        about = "the most events that a client lags behind"
        yield self._one(GaugeMetricFamily, "unread_events", about, self._engine.unread)
        for name, about, value in (
            ("engine_restarts", "engines started after the first", health.restarts),
            ("engine_steps", "runs of the model", stats.steps),
            ("engine_step_tokens", "tokens computed by them", stats.step_tokens),
            ("engine_recomputed_tokens", "tokens computed again", stats.recomputed),
            ("engine_retries", "steps that raised and were tried again", stats.retries),
            ("nan_rows", "rows whose logits were not numbers", stats.nan_rows),
        ):
            yield self._one(CounterMetricFamily, name, about, value)
        info, names = (str(stats.page_size), str(stats.pages)), ("block_size", "num_gpu_blocks")
        config = "vllm:cache_config_info"
        yield self._many(GaugeMetricFamily, config, "the KV cache", [(info, 1)], names)
        kernels = self._engine.info.get("kernels", {}).items()
        ways = [((kernel, why.partition(":")[0]), 1) for kernel, why in kernels]
        about = "how each kernel runs: on a GPU, torch means that it is not trusted"
        yield self._many(GaugeMetricFamily, "kernels", about, ways, ("kernel", "way"))
        for name, about, label, counts in (
            ("requests_aborted", "cancelled or failed, by where", "where", stats.aborted),
            ("engine_requests_rejected", "refused in the engine", "reason", stats.rejected),
        ):
            rows = [((word,), count) for word, count in sorted(counts.items())]
            yield self._many(CounterMetricFamily, name, about, rows, (label,))

    def _one(self, kind: Any, name: str, about: str, value: float) -> Metric:
        return self._many(kind, name, about, [((), value)], ())

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        return self._many(GaugeMetricFamily, name, about, [(self._labels, value)], LABELS)

    def _many(
        self,
        kind: Any,
        name: str,
        about: str,
        rows: Iterable[tuple[tuple[str, ...], float]],
        labels: tuple[str, ...],
    ) -> Metric:
        family: Any = kind(name, about, labels=labels)
        for values, value in rows:
            family.add_metric(values, value)
        metric: Metric = family
        return metric
