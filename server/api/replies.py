"""Errors as responses: OpenAI's object, whatever it was that failed."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.api.shapes import encode
from server.errors import InvalidKey, KvistError, NotFound, Refused, WrongMethod

BROKEN = "Something broke in the server; its log knows more under this request's id."


def said(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, "application/json")


def refusal(error: KvistError) -> Response:
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, InvalidKey):
        headers["www-authenticate"] = "Bearer"
    return said(error.body(), error.status, headers)


async def on_kvist_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvistError)
    request.scope["state"]["error"] = error.code
    request.app.state.front.metrics.rejected(error.code)
    return refusal(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """The framework's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    kind: KvistError
    if error.status_code == 404:
        kind = NotFound(f"There is no route {path!r}.")
    elif error.status_code == 405:
        kind = WrongMethod(f"{request.method[:20]} is not a method of {path!r}.")
    else:
        kind = Refused("The request cannot be understood.")
    response = await on_kvist_error(request, kind)
    if error.headers and "allow" in (lower := {k.lower(): v for k, v in error.headers.items()}):
        response.headers["allow"] = lower["allow"]
    return response


async def on_bug(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The log knows more; the client learns only that it was not its fault."""
    return refusal(KvistError(BROKEN))
