"""Text to token ids and back, as the model does it."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.body import load
from server.api.front import Front
from server.api.keys import known
from server.api.prompt import render
from server.api.replies import said
from server.api.schema import DetokenizeBody, TokenizeBody
from server.api.served import Served
from server.errors import InvalidField

routes = APIRouter(tags=["tokens"], dependencies=[Depends(known)])


@routes.post("/tokenize", include_in_schema=False)
@routes.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """The token ids of a text or a conversation."""
    front: Front = request.app.state.front
    served = front.open()
    work = partial(_tokenize, front, served)
    return said(await load(request, served.limits, front.pool, work))


def _tokenize(front: Front, served: Served, raw: dict[str, Any]) -> dict[str, Any]:
    body, warnings = front.parse(served, TokenizeBody, raw)
    served.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidField("Send 'prompt' or 'messages', one of them.", "prompt")
    if body.messages is not None and "add_special_tokens" in body.model_fields_set:
        wrong = "'add_special_tokens' is for a 'prompt'; a chat template says which there are."
        raise InvalidField(wrong, "add_special_tokens")
    if body.messages is not None:
        _, ids = render(served, body)
    else:
        ids = served.words.encode(body.prompt or "", bos=body.add_special_tokens)
    made: dict[str, Any] = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
    if body.return_token_strs:
        made["token_strs"] = [_spelled(served, id) for id in ids]
    return made | ({"warnings": warnings} if warnings else {})


def _spelled(served: Served, id: int) -> str:
    return served.words.token_bytes(id).decode("utf-8", "replace")


@routes.post("/detokenize", include_in_schema=False)
@routes.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    front: Front = request.app.state.front
    served = front.open()
    work = partial(_detokenize, front, served)
    return said(await load(request, served.limits, front.pool, work))


def _detokenize(front: Front, served: Served, raw: dict[str, Any]) -> dict[str, Any]:
    body, warnings = front.parse(served, DetokenizeBody, raw)
    served.check_name(body.model)
    text = served.words.decode(body.tokens, skip_special=body.skip_special_tokens)
    return {"prompt": text} | ({"warnings": warnings} if warnings else {})


@routes.get("/tokenizer_info", include_in_schema=False)
@routes.get("/v1/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What a client needs to tokenise as the server does."""
    front: Front = request.app.state.front
    served = front.open()
    words = served.words
    named = {"eos_token": words.eos, "bos_token": words.bos}
    return said(
        {
            "tokenizer_class": type(words).__name__,
            "vocab_size": served.vocabulary,
            "model_max_length": served.context,
            "chat_template": served.template.source if served.template else None,
            **{name: None if id is None else _spelled(served, id) for name, id in named.items()},
            **{f"{name}_id": id for name, id in named.items()},
            "special_tokens": words.special,
        }
    )
