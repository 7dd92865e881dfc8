"""The application: routes, errors, and the door around them."""

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from server.api import admin, embeddings, generate, tokens
from server.api.docs import describe
from server.api.door import Door
from server.api.front import Front
from server.api.replies import on_bug, on_http_error, on_kvist_error
from server.errors import KvistError
from server.version import VERSION

WEB = Path(__file__).parents[1] / "web"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build(front: Front) -> Door:
    """The ASGI application around what its routes share."""
    shown = front.settings.docs
    if shown is None:
        shown = front.settings.host in LOOPBACK
    app = FastAPI(
        title="Kvist",
        version=VERSION,
        docs_url="/docs" if shown else None,
        openapi_url="/openapi.json" if shown else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.front = front
    for router in (generate.routes, tokens.routes, embeddings.routes, admin.routes, admin.keyed):
        app.router.routes.extend(router.routes)
    app.add_exception_handler(KvistError, on_kvist_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    describe(app)
    if shown and WEB.is_dir() and any(WEB.glob("*.html")):
        app.mount("/playground", StaticFiles(directory=WEB, html=True))
    return Door(app, front, generate.POSTS)
