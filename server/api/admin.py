"""For operators and for clients that ask around: health, models, metrics, version."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.front import Front
from server.api.keys import known
from server.api.replies import said
from server.api.served import Served
from server.version import VERSION

HUNG = 60.0  # seconds without a sign of life until an orchestrator should start us anew

routes = APIRouter(tags=["admin"])
keyed = APIRouter(tags=["admin"], dependencies=[Depends(known)])


@routes.get("/health/live")
async def live(request: Request) -> Response:
    """200 while this process works; 503 when only a new one will help."""
    front: Front = request.app.state.front
    health = front.engine.health()
    lost = health.state == "failed" or (health.state == "hung" and health.age > HUNG)
    return said({"status": "dead" if lost else "live"}, 503 if lost else 200)


@routes.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 when a request would be served now."""
    return _ready(request.app.state.front)


@keyed.get("/health")
async def health(request: Request) -> Response:
    """As /health/ready, with what there is to know."""
    return _ready(request.app.state.front, request.app.state.front.served)


def _ready(front: Front, served: Served | None = None) -> Response:
    health = front.engine.health()
    state = "draining" if front.draining else health.state
    if state == "ready" and not front.ready:
        state = "loading"
    body: dict[str, Any] = {"status": state}
    if state != "ready" and health.reason:
        body["reason"] = health.reason
    if served is not None:
        body |= {"restarts": health.restarts, "about": served.about}
    return said(body, 200 if front.ready else 503)


@keyed.get("/v1/models")
async def models(request: Request) -> Response:
    """What is served, under each of its names."""
    served = request.app.state.front.open()
    return said({"object": "list", "data": [_model(served, name) for name in served.names]})


@keyed.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    served = request.app.state.front.open()
    served.check_name(name)
    return said(_model(served, name))


def _model(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "kvist",
        "root": served.name,
        "max_model_len": served.context,
    }


@keyed.get("/version")
async def version() -> Response:
    return said({"version": VERSION})


async def may_scrape(request: Request) -> None:
    """Metrics need a key like everything else, unless the operator opens them."""
    front: Front = request.app.state.front
    if not front.settings.open_metrics:
        await known(request)


@routes.get("/metrics", dependencies=[Depends(may_scrape)])
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    front: Front = request.app.state.front
    return Response(front.metrics.page(), media_type="text/plain; version=0.0.4")
