"""The outermost layer: ids, hosts, the access log, and no failure leaves without being told."""

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.front import Front
from server.api.replies import BROKEN, refusal
from server.errors import KvistError, WrongHost

Endpoint = Callable[[Request], Awaitable[Response]]
ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OPEN = ("/health/live", "/health/ready")  # probes name hosts as they like
log = logging.getLogger("kvist.access")


class Door:
    def __init__(self, app: FastAPI, front: Front, posts: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._front = front
        self._posts = posts  # what answers a POST to a path without the framework
        self._hosts = {host.lower() for host in front.settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        state = scope.setdefault("state", {})
        state["id"] = name = _id(scope)
        status = 0  # until the answer begins

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        try:
            self._check_host(scope)
            await self._answer(scope, receive, send_on)
        except KvistError as error:
            state["error"] = error.code  # the word alone: its traceback leads back here, a cycle
            self._front.metrics.rejected(error.code)
            await refusal(error)(scope, receive, send_on)
        except Exception as error:
            state["error"] = type(error).__name__
            log.exception("failed", extra={"kvist": {"request_id": name.decode()}})
            if not status:
                await refusal(KvistError(BROKEN))(scope, receive, send_on)
        finally:
            seconds = time.monotonic() - began
            _tell(scope, state, status, seconds)
            if self._front.traces is not None and "meter" in state:
                self._trace(scope, state, status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The framework's matching, middleware, exit stacks and dependencies took a third of the
        CPU time of a completion, which needs none: it checks its key and body itself."""
        endpoint = self._posts.get(scope["path"]) if scope["method"] == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        await self._front.coming.mine()
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    def _trace(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        """A span of the GenAI conventions."""
        asked, usage, meter = state["answer"].asked, state["answer"].usage, state["meter"]
        code = state.get("error")
        told: dict[str, str | int | float] = {
            "gen_ai.operation.name": meter.operation,
            "gen_ai.provider.name": "kvist",
            "gen_ai.request.model": asked.served.name,
            "gen_ai.request.max_tokens": asked.requests[0].max_tokens,
            "gen_ai.response.id": asked.id,
            "gen_ai.usage.input_tokens": usage.prompt,
            "gen_ai.usage.output_tokens": usage.completion,
            "http.response.status_code": status,
        }
        if code is not None:
            told["error.type"] = code
        if meter.first is not None:
            told["gen_ai.server.time_to_first_token"] = meter.first - meter.began
        name = f"{meter.operation} {asked.served.name}"
        assert self._front.traces is not None
        self._front.traces.add(scope["headers"], name, seconds, told, code)

    def _check_host(self, scope: Scope) -> None:
        if not self._hosts or scope["path"] in OPEN:
            return
        said = [value for name, value in scope["headers"] if name == b"host"]
        host = said[0].decode("latin-1").lower() if len(said) == 1 else ""
        bare = re.sub(r":\d*$", "", host)
        if bare not in self._hosts and host not in self._hosts:
            raise WrongHost("This server does not answer to that Host.")


def _id(scope: Scope) -> bytes:
    """The client's id when it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and ID.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(16).encode()


def _tell(scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
    """One line a request: never a prompt, never an answer."""
    if not log.isEnabledFor(logging.INFO):
        return
    error, meter, answer = state.get("error"), state.get("meter"), state.get("answer")
    told: dict[str, Any] = {
        "request_id": state["id"].decode(),
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    if answer is not None:
        usage = answer.usage
        told |= {"model": answer.asked.served.name, "prompt_tokens": usage.prompt}
        told |= {"completion_tokens": usage.completion}
    if meter is not None and meter.first is not None:
        told["ttft_ms"] = round((meter.first - meter.began) * 1000, 1)
    if error is not None:
        told["error"] = error
    log.info("request", extra={"kvist": told})
