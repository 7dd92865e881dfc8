"""The OpenAPI page: the bodies are read by hand, so their schemas are told by hand."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def describe(app: FastAPI) -> None:
    """Each route with an `x-body` shows that model as its body."""
    bodies = {}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.openapi_extra:
            bodies[route.path] = route.openapi_extra.pop("x-body")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_bodies(app, bodies)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_bodies(app: FastAPI, bodies: dict[str, Any]) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema(
        [(body, "validation") for body in bodies.values()], ref_template=REF
    )
    made.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, body in bodies.items():
        schema = {"$ref": REF.format(model=body.__name__)}
        content = {"application/json": {"schema": schema}}
        made["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return made
