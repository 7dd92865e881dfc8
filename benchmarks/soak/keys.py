"""G13: without a key nothing is said. The routes are the application's, so none is forgotten."""

import argparse
import asyncio
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starlette.routing import Mount, Route

from benchmarks.served import served, status
from benchmarks.soak.ask import Row, row
from benchmarks.soak.health import health
from server.api.app import build
from server.api.front import Front
from server.api.keys import Keys
from server.config import Settings
from server.engine.process import Blueprint, Client
from server.metrics import Metrics

OPEN = {"/health/live", "/health/ready"}
SHOWN = {
    "/docs",
    "/docs/oauth2-redirect",
    "/openapi.json",
    "/playground",
}  # on loopback: what is not secret
NO_KEY: list[dict[str, str]] = [  # every way of not having one, of which the right ones are two
    {}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first"},
    {"authorization": "first"}, {"authorization": "Bearer"}, {"authorization": "Bearer \xe9"},
    {"authorization": "Bearer first second"}, {"authorization": "Bearer FIRST"},
    {"x-api-key": "first"}, {"api-key": "first"}, {"cookie": "authorization=Bearer first"},
    {"x-original-url": "/health/live"}, {"x-rewrite-url": "/health/live"},
    {"x-http-method-override": "GET"}, {"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=::1"},
]  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "get", "LIVE")
PATHS = (  # how a path can be written so that two readers read it differently
    "{}", "/{}", "{}/", "{}?/health/live", "{}#/health/live", "{};/health/live", "/.{}",
    "/health/live/..{}", "/health/live/../..{}", "/health/live/%2e%2e/%2e%2e{}",
    "/health/live%2f..%2f..{}", "/health/ready%00{}", "http://x{}", "/%2f{}", "\\{}", "*{}",
    "http://x/health/live/../..{}",
)  # fmt: skip
HOSTS = ("x", "/health/live", "x/health/live", "x/health/live?", "localhost", "health.live:0", "")


def routes(app: Any) -> list[tuple[str, str]]:
    """Every method and path of the application behind its door."""
    named = [one for one in app._app.routes if isinstance(one, Route | Mount)]
    return [
        (method, one.path.replace("{name:path}", "tiny"))
        for one in named
        for method in sorted(getattr(one, "methods", None) or {"GET"})
    ]


def attempts(app: Any, hosts: Sequence[str]) -> Iterator[bytes]:
    """All that somebody without a key can try."""
    for method, path in routes(app):
        for more in NO_KEY:
            yield message(method, path, hosts[0], more)
    for path in sorted({path for _, path in routes(app)} - OPEN - SHOWN):
        for trick in PATHS:
            for host in hosts:
                yield message("GET", trick.format(path), host)
        for method in METHODS:
            yield message(method, path, hosts[0])
            yield message("POST", path, hosts[0], {"x-http-method-override": method})


def message(
    method: str, path: str, host: str = "x", headers: dict[str, str] | None = None
) -> bytes:
    said = {"host": host, "connection": "close", "content-length": "0"} | (headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def told(data: bytes, answer: bytes) -> bool:
    """Whether somebody got past: any success but from what is open to all."""
    path = data.split(b" ", 2)[1].decode("latin-1")
    return 200 <= status(answer) < 400 and path not in OPEN | SHOWN


def bypasses(port: int, app: Any, hosts: Sequence[str] = HOSTS) -> tuple[int, list[bytes]]:
    """How many attempts were made, and those that got past."""
    tried = list(attempts(app, hosts))
    return len(tried), [data for data in tried if told(data, exchange(port, data))]


def exchange(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 30) as one:
        one.sendall(data)
        parts = []
        while part := one.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def application() -> Any:
    """As the server builds it, around an engine that is not started."""
    front = Front(Settings(), Client(Blueprint()), Metrics("x", "x"), Keys(None))
    front.pool.close()
    return build(front)


async def auth(asked: argparse.Namespace) -> Row:
    """G13: every route with no key, and with tricks of path, host and method."""
    app = application()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text("first\nsecond\n")
        async with served(asked, "--api-keys", str(file)) as one, health(one) as seen:
            tried, past = await asyncio.to_thread(bypasses, one.port, app)
            right = [
                message("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
                for key in ("first", "second")
            ]
            known = [status(await one.raw(data)) for data in right]
    for data in past[:5]:
        print(data)
    found = {"routes": len(routes(app)), "attempts": tried, "bypasses": len(past), "known": known}
    return row("G13", "no key", not past and known == [200, 200], found, seen)
