"""The OpenAPI page: the bodies are read by hand, so their schemas are told by hand."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.api.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    Strict,
    TokenizeBody,
)

REF = "#/components/schemas/{model}"
BODIES: dict[str, type[Strict]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/tokenize": TokenizeBody,
    "/v1/detokenize": DetokenizeBody,
}


def describe(app: FastAPI) -> None:
    """Show each route's body beside it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_bodies(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_bodies(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema(
        [(body, "validation") for body in BODIES.values()], ref_template=REF
    )
    made.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, body in BODIES.items():
        schema = {"$ref": REF.format(model=body.__name__)}
        content = {"application/json": {"schema": schema}}
        made["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return made
