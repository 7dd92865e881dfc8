"""POST /v1/completions and /v1/chat/completions: read, ask the engine, answer."""

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import ask
from server.api.answer import Answer
from server.api.body import load
from server.api.front import Front
from server.api.keys import known
from server.api.schema import ChatBody, CompletionBody
from server.api.served import Served
from server.api.shapes import ChatShape, CompletionShape, Shape
from server.api.stream import Plain, Stream
from server.metrics import Meter

routes = APIRouter(tags=["generate"])


@routes.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Go on with a text."""
    return await _generate(request, _completion, CompletionShape, "text_completion")


@routes.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    """Answer a conversation."""
    return await _generate(request, _chat, ChatShape, "chat")


POSTS = {"/v1/completions": completions, "/v1/chat/completions": chat}
Ask = Callable[[Front, Served, str, dict[str, Any]], ask.Asked]


async def _generate(request: Request, read: Ask, shape: type[Shape], operation: str) -> Response:
    salt = await known(request)
    front: Front = request.app.state.front
    meter = Meter(front.metrics, operation)
    served = front.open()
    slow = operation == "chat"  # a template is a program of the model's makers
    work = partial(read, front, served, salt)
    asked = await load(request, served.limits, front.pool, work, slow)
    first = asked.requests[0]
    meter.asked(sum(len(one.prompt) for one in asked.requests), asked.n, first.max_tokens)
    answer = Answer(asked)
    kind = Stream if asked.body.stream else Plain
    return kind(front, answer, shape(answer, int(time.time())), meter)


def _completion(front: Front, served: Served, salt: str, raw: dict[str, Any]) -> ask.Asked:
    body, warnings = front.parse(served, CompletionBody, raw)
    made = ask.completion(served, body, f"cmpl-{secrets.token_hex(16)}", salt)
    made.warnings.extend(warnings)
    return made


def _chat(front: Front, served: Served, salt: str, raw: dict[str, Any]) -> ask.Asked:
    body, warnings = front.parse(served, ChatBody, raw)
    made = ask.chat(served, body, f"chatcmpl-{secrets.token_hex(16)}", salt)
    made.warnings.extend(warnings)
    return made
