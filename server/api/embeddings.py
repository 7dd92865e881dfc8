"""POST /v1/embeddings: texts as vectors, pooled from the decoder's last layer."""

import base64
import struct
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.body import load
from server.api.front import Front
from server.api.keys import known
from server.api.replies import said
from server.api.schema import EmbeddingBody
from server.api.served import Served
from server.api.stream import Heard
from server.errors import InvalidField, TooLong, UnsupportedField

routes = APIRouter(tags=["embeddings"], dependencies=[Depends(known)])


@routes.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """One vector a text: the mean of its tokens' last hidden states, or the last of them."""
    front: Front = request.app.state.front
    served = front.open()
    body, prompts = await load(request, served.limits, front.pool, partial(_read, front, served))
    with Heard(request.receive):  # one a question, so that steps of others run in between
        ask = partial(front.engine.ask, "embed", pooling=body.pooling)
        vectors: list[list[float]] = [await ask(prompt=prompt) for prompt in prompts]
    if body.dimensions not in (None, len(vectors[0])):
        wrong = f"'dimensions' is {body.dimensions}, but this model has {len(vectors[0])}."
        raise UnsupportedField(wrong, "dimensions")
    return said(_answer(served, body, prompts, vectors))


def _read(
    front: Front, served: Served, raw: dict[str, Any]
) -> tuple[EmbeddingBody, list[list[int]]]:
    body, _ = front.parse(served, EmbeddingBody, raw)
    served.check_name(body.model)
    prompts = [one if isinstance(one, list) else served.words.encode(one) for one in body.input]
    for ids in prompts:
        if not ids:
            raise InvalidField("'input' has a text without tokens.", "input")
        if len(ids) > min(served.context, served.capacity):
            most = min(served.context, served.capacity)
            said = f"This model's maximum context length is {most} tokens, but 'input' has"
            raise TooLong(f"{said} a text of {len(ids)}.", "input")
    return body, prompts


def _answer(
    served: Served, body: EmbeddingBody, prompts: list[list[int]], vectors: list[list[float]]
) -> dict[str, Any]:
    made = [_unit(vector) if body.normalize else vector for vector in vectors]
    packed = [_packed(vector) if body.encoding_format == "base64" else vector for vector in made]
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(packed)
    ]
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


def _unit(vector: list[float]) -> list[float]:
    length: float = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector] if length else vector


def _packed(vector: list[float]) -> str:
    """float32, little-endian, as OpenAI's client unpacks it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
