"""From settings to an engine over a real network. Only the engine's own process imports this.

The options are fields of `Settings` under their own names, as plain data.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.cache import Rows
from model.checkpoint import CheckpointError, locate
from model.decoder import Decoder
from model.start import DoesNotFitError, Ready, start
from model.tokenfiles import TokenizerError
from model.tokenizer import Tokenizer
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Request
from server.engine.text import Text
from server.errors import InvalidField, ModelError, SettingError


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    folder: Path
    ready: Ready
    tokenizer: Tokenizer

    @property
    def eos(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        words = self.tokenizer.eos
        return self.ready.config.eos or (() if words is None else (words,))

    def text(self, request: Request) -> Text:
        decoder = self.tokenizer.decoder(request.skip_special, continuing=True)
        return Text(decoder, request.stop, request.include_stop)

    def name(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")


# Of a CPU and of a GPU. Who decodes waits for a chunk of another's prompt, on a CPU about a second,
# and more at once is no faster there.
STEP_TOKENS = (512, 2048)


def build(*, prefix_cache: bool = True, **options: Any) -> Engine:
    """An engine, loaded and warm."""
    parts, scheduling = assemble(**options)
    return Engine(**kit(parts, scheduling, prefix_cache))


def kit(parts: Parts, options: Options, prefix_cache: bool) -> dict[str, Any]:
    """The arguments of `Engine`."""
    ready = parts.ready
    cache = ready.runner.cache
    info = {
        "model": parts.folder.name,
        "folder": str(parts.folder),
        "tokenizer": parts.tokenizer.engine,
        "vocabulary": options.vocabulary,
        "eos": list(parts.eos),
        "rows": options.seats,
        "step_tokens": options.budget,
    }
    return {
        "executor": ready.runner,
        "pages": Pages(ready.pages, cache.page_size, caching=prefix_cache),
        "options": options,
        "text": parts.text,
        "name": parts.name,
        "info": ready.about | info,
        "answers": {"embed": _embedder(ready.runner.decoder, ready.runner.device)},
    }


def assemble(
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    rows: int = 256,
    step_tokens: int | None = None,
    draft: int = 0,
    queue_requests: int = 1024,
    queue_factor: float = 4.0,
    **how: Any,
) -> tuple[Parts, Options]:
    """Load everything; raises ModelError for what is wrong with the model, else SettingError.
    `how` are the arguments of `model.start.start`, under the names that settings have."""
    try:
        folder = locate(model)
        words = Tokenizer.load(tokenizer or folder)
        ready = start(folder, rows=rows, **how)
    except DoesNotFitError as error:
        raise SettingError(str(error)) from error
    except (CheckpointError, TokenizerError, ValueError) as error:
        raise ModelError(str(error)) from error
    except RuntimeError as error:
        raise _too_large(error) from error
    gpu = ready.runner.device.type == "cuda"
    options = Options(
        seats=rows,
        budget=step_tokens or max(rows, STEP_TOKENS[gpu]),
        ahead=int(gpu),  # a CPU gains nothing by not looking
        queue=queue_requests,
        queue_tokens=int(queue_factor * ready.pages * ready.runner.cache.page_size),
        draft=draft,
        context=ready.context,
        vocabulary=ready.config.vocabulary,
    )
    return Parts(folder, ready, words), options


def _too_large(error: RuntimeError) -> Exception:
    """Memory that is not there, in our words; anything else as it is."""
    wanted = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
    if wanted is None:
        return error
    return SettingError(
        f"There is not enough memory: the engine {wanted[0].lower()}. Give it fewer --pages, fewer"
        " --rows or a shorter --context, or take --quantize int8 or a smaller model."
    )


def _embedder(decoder: Decoder, device: torch.device) -> Callable[..., list[float]]:
    @torch.inference_mode()
    def embed(prompt: list[int], pooling: str = "mean") -> list[float]:
        """The last layer's states of a text, as one vector."""
        if pooling not in ("mean", "last"):
            raise InvalidField(f"pooling is {pooling!r}: mean or last.", "pooling")
        tokens = torch.tensor(prompt, dtype=torch.int64, device=device)
        hidden = decoder(tokens, Rows.alone([len(prompt)], device), None).float()
        vector: list[float] = (hidden.mean(0) if pooling == "mean" else hidden[-1]).tolist()
        return vector

    return embed
