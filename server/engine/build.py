"""A real engine from plain options: what the engine's process, and the offline API, begin with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from model.cache import PAGE, Rows
from model.checkpoint import CheckpointError, generation, locate
from model.runner import Runner
from model.start import DoesNotFitError, start
from model.tokenizer import Tokenizer
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Request
from server.engine.text import Text
from server.errors import SettingError


def build(
    model: str | None = None,
    *,
    tokenizer: str | None = None,
    dtype: str = "auto",
    quantize: Literal["none", "int8"] = "none",
    context: int = 0,
    device: str = "auto",
    threads: int = 0,
    memory: float = 0.9,
    pages: int = 0,
    page_size: int = PAGE,
    rows: int = 256,
    step_tokens: int = 2048,
    prefix_cache: bool = True,
    draft: int = 0,
    queue: int = 1024,
    queue_tokens: int = 0,
) -> Engine:
    """Names and meanings are those of `Settings`. Raises SettingError."""
    try:
        folder = locate(model)
        words = Tokenizer.load(Path(tokenizer) if tokenizer else folder)
        ready = start(
            folder,
            device=device,
            dtype=dtype,
            quantize=quantize,
            context=context,
            pages=pages,
            page_size=page_size,
            memory=memory,
            rows=rows,
            threads=threads,
        )
    except (CheckpointError, DoesNotFitError, ValueError) as error:
        raise SettingError(str(error)) from error
    ahead = int(ready.runner.device.type == "cuda")  # on a CPU nothing is won by not looking
    options = Options(
        seats=rows,
        budget=step_tokens,
        ahead=ahead,
        queue=queue,
        queue_tokens=queue_tokens,
        draft=draft,
        context=ready.context,
        vocabulary=ready.config.vocabulary,
    )
    return Engine(
        ready.runner,
        Pages(ready.pages, page_size, caching=prefix_cache),
        options,
        text=_texts(words),
        name=lambda token: words.token_bytes(token).decode(errors="replace"),
        info=ready.about
        | {"model": str(folder), "eos": ends(folder, ready.config.eos, words), "rows": rows}
        | {"vocabulary": ready.config.vocabulary, "tokenizer": words.engine},
        answers={"embed": _embed(ready.runner)},
    )


def ends(folder: Path, configured: tuple[int, ...], words: Tokenizer) -> list[int]:
    """Every id that ends a text: generation_config.json knows best, then config.json."""
    told = generation(folder).get("eos_token_id")
    if told is not None:
        return sorted(told) if isinstance(told, list) else [told]
    return sorted(configured) or ([] if words.eos is None else [words.eos])


def _texts(words: Tokenizer) -> Callable[[Request], Text]:
    def text(request: Request) -> Text:
        return Text(words.decoder(request.skip_special), request.stop, request.include_stop)

    return text


def _embed(runner: Runner) -> Callable[..., Any]:
    """Texts as vectors, between two steps; they need no pages."""

    @torch.inference_mode()
    def embed(prompt: list[int], pooling: str) -> list[float]:
        tokens = torch.tensor(prompt, device=runner.device)
        hidden = runner.decoder(tokens, Rows.alone([len(prompt)], runner.device)).float()
        pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
        return pooled.tolist()

    return embed
