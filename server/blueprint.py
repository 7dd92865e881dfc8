"""What of the settings an engine is built from, as plain data. No torch is needed to say it."""

from typing import Any

from server.config import Settings
from server.errors import SettingError

NOT_YET = {"quantize": ("int4", "fp8"), "kv_dtype": ("fp8", "int8")}

PLAIN = (
    *("model", "dtype", "quantize", "context", "device", "kernels", "threads", "memory", "pages"),
    *("page_size", "rows", "step_tokens", "prefix_cache", "draft", "deterministic"),
)


def engine_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `server.engine.build.build`."""
    for name, values in NOT_YET.items():
        if (value := getattr(settings, name)) in values:
            raise SettingError(f"{name} {value} is not served yet; see --help for what is.")
    given = {name: getattr(settings, name) for name in PLAIN}
    limits = settings.limits
    return given | {
        "tokenizer": settings.tokenizer and str(settings.tokenizer),
        "queue_requests": limits.queue_requests,
        "queue_factor": limits.queue_factor,
    }
