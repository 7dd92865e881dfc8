"""Traces for OpenTelemetry: a span a request, sent as OTLP's JSON to a collector, if there is one.

A client's W3C `traceparent` is the parent. What cannot be sent in time is dropped: a collector that
is down costs nothing but its traces. Attributes are those of the GenAI conventions.
"""

import asyncio
import json
import logging
import re
import secrets
import time
import urllib.request
from collections import deque
from dataclasses import dataclass
from typing import Any

from server.version import VERSION

PARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
KEPT = 2048  # spans that wait
EVERY = 2.0  # seconds between two messages
SERVER, FAILED = 2, 2  # OTLP's numbers: kind of span, status
log = logging.getLogger("kvist.traces")


@dataclass(frozen=True)
class Span:
    trace: str
    parent: str
    name: str
    began: int  # nanoseconds since 1970
    ended: int
    attributes: dict[str, str | int | float]
    error: str | None

    def told(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "traceId": self.trace,
            "spanId": secrets.token_hex(8),
            "name": self.name,
            "kind": SERVER,
            "startTimeUnixNano": str(self.began),
            "endTimeUnixNano": str(self.ended),
            "attributes": [_attribute(*pair) for pair in self.attributes.items()],
        }
        if self.parent:
            made["parentSpanId"] = self.parent
        if self.error:
            made["status"] = {"code": FAILED, "message": self.error}
        return made


def _attribute(name: str, value: str | int | float) -> dict[str, Any]:
    if isinstance(value, str):
        return {"key": name, "value": {"stringValue": value}}
    if isinstance(value, int):
        return {"key": name, "value": {"intValue": str(value)}}
    return {"key": name, "value": {"doubleValue": value}}


class Traces:
    def __init__(self, endpoint: str) -> None:
        base = endpoint.rstrip("/")
        self._url = base if base.endswith("/v1/traces") else base + "/v1/traces"
        self._waiting: deque[Span] = deque(maxlen=KEPT)

    def add(
        self,
        headers: list[tuple[bytes, bytes]],
        name: str,
        seconds: float,
        attributes: dict[str, str | int | float],
        error: str | None,
    ) -> None:
        """A request that is over; unless its client said that nobody samples this trace."""
        parent = next((value for key, value in headers if key == b"traceparent"), b"")
        found = PARENT.fullmatch(parent)
        if found and not int(found[3], 16) & 1:
            return
        trace, above = (found[1].decode(), found[2].decode()) if found else ("", "")
        ended = time.time_ns()
        began = ended - int(seconds * 1e9)
        trace = trace or secrets.token_hex(16)
        self._waiting.append(Span(trace, above, name, began, ended, attributes, error))

    async def run(self) -> None:
        """Send what waits, every now and then, until it is cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(EVERY)
                await asyncio.to_thread(self.send)
        finally:
            self.send()

    def send(self) -> None:
        spans = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not spans:
            return
        service = [_attribute("service.name", "kvist"), _attribute("service.version", VERSION)]
        scope = {"scope": {"name": "kvist"}, "spans": [span.told() for span in spans]}
        body = {"resourceSpans": [{"resource": {"attributes": service}, "scopeSpans": [scope]}]}
        request = urllib.request.Request(  # noqa: S310, the operator's own address
            self._url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2):  # noqa: S310
                pass
        except (OSError, ValueError) as error:
            log.warning("%d spans could not be sent to %s: %s", len(spans), self._url, error)
