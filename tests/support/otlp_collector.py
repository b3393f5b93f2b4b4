"""A collector for OTLP over HTTP: decodes what it is sent, answers as it is told, and remembers spans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


class Span(NamedTuple):
    """A span as the collector got it."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    begun: float
    ended: float
    is_error: bool
    told: str


class OtlpCollector:
    """Listens on a port of its own until ``stop``."""

    def __init__(self, status: int = 200, silence_seconds: float = 0.0) -> None:
        """``status`` is the answer to each request; ``silence_seconds`` goes by before it, unless it is stopped."""
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._stopped = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if silence_seconds:
                    collector._stopped.wait(silence_seconds)
                collector.headers.append(
                    {"path": self.path} | {name.lower(): text for name, text in self.headers.items()}
                )
                if status == 200:
                    collector.bodies.append(body)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Nothing: pytest shows what matters."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._serving = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._serving.start()

    @property
    def url(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        """All that came, in their order."""
        return [span for body in list(self.bodies) for span in _spans(body)]

    def wait_for(self, enough: Callable[[list[Span]], object], timeout_seconds: float = 15.0) -> list[Span]:
        """The spans, once there are enough."""
        until = time.monotonic() + timeout_seconds
        while not enough(spans := self.spans):
            assert time.monotonic() < until, f"not enough spans: {spans}"
            time.sleep(0.02)
        return spans

    def stop(self) -> None:
        """Answers no more."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._serving.join(5)


def _spans(body: bytes) -> list[Span]:
    return [
        _span(span, _values(of_resource.resource.attributes))
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        span.name,
        KINDS[span.kind],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        _values(span.attributes),
        resource,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        span.status.code == 2,
        span.status.message,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    if value.WhichOneof("value") == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, value.WhichOneof("value") or "string_value")
