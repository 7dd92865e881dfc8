"""What of the settings an engine is built from, as plain data. No torch is needed to say it."""

from typing import Any

from server.config import Settings

PLAIN = (
    *("model", "dtype", "quantize", "context", "device", "kernels", "threads", "memory", "pages"),
    *("page_size", "kv_dtype", "rows", "step_tokens", "prefix_cache", "draft", "deterministic"),
)


def engine_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `server.engine.build.build`."""
    given = {name: getattr(settings, name) for name in PLAIN}
    limits = settings.limits
    return given | {
        "tokenizer": settings.tokenizer and str(settings.tokenizer),
        "queue_requests": limits.queue_requests,
        "queue_factor": limits.queue_factor,
    }
