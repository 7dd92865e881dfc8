"""Traces, as a collector gets them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from server.traces import Traces
from tests.server.rig import Rig, running
from tests.server.test_api_http import COMPLETION, call, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(
                (self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running() as made:
        yield made


def test_a_span_a_request(rig: Rig) -> None:
    with collector() as (url, got):
        traces = rig.front.traces = Traces(url)
        sampled = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        call(rig, "/v1/completions", COMPLETION, headers=sampled)
        call(rig, "/v1/completions", COMPLETION, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        rig.engine.fail_at = 2
        call(rig, "/v1/completions", COMPLETION | {"stream": True})
        call(rig, "/version")
        until(lambda: len(traces._waiting) == 2)
        traces.send()
    path, body = got[0]
    assert path == "/v1/traces"
    good, bad = body["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert (good["traceId"], good["parentSpanId"]) == (TRACE, PARENT)
    assert good["name"] == "text_completion tiny"
    told = {one["key"]: next(iter(one["value"].values())) for one in good["attributes"]}
    assert told["gen_ai.usage.output_tokens"] == "4"
    assert told["gen_ai.operation.name"] == "text_completion"
    assert int(good["endTimeUnixNano"]) >= int(good["startTimeUnixNano"])
    assert bad["traceId"] != TRACE
    assert bad["status"] == {"code": 2, "message": "engine_down"}


def test_a_collector_that_is_down_costs_only_its_spans() -> None:
    traces = Traces("http://127.0.0.1:9/v1/traces")
    traces.add([], "x", 0.1, {}, None)
    traces.send()
    assert not traces._waiting
