"""The health page: ``/livez`` and ``/readyz`` on PORT, as lfx has them, and ``/metrics`` for Prometheus.

``/livez`` is 200 while the process runs; ``/readyz`` is 200 when NATS is connected, else 503. The body of
``/readyz`` says more, as JSON. Served by gevent's own WSGI server, meant for probes and scrapers, not for the Internet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from relay.errors import ConfigError
from relay.ops.metrics import CONTENT_TYPE

MAX_CONNECTIONS = 1000
REQUEST_SECONDS = 2.0


class _Handler(WSGIHandler):  # type: ignore[misc]
    """One request a connection, and only so long to send it: idle connections must not keep the probes out."""

    def handle(self) -> None:
        self.socket.settimeout(REQUEST_SECONDS)
        super().handle()

    def read_request(self, raw_requestline: str) -> bool:
        is_readable = bool(super().read_request(raw_requestline))
        self.close_connection = True
        return is_readable


class HealthServer:
    """Serves the page until ``stop``. ``readiness()`` gives (ready, facts for the body), ``metrics()`` all of that."""

    def __init__(
        self,
        host: str,
        port: int,
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        metrics: Callable[[], bytes],
    ) -> None:
        self._readiness = readiness
        self._metrics = metrics
        self._server = WSGIServer(
            (host, port), self._answer, log=None, error_log=None, spawn=Pool(MAX_CONNECTIONS), handler_class=_Handler
        )

    def start(self) -> None:
        """Starts listening. Raises ``ConfigError`` when the port cannot be had."""
        try:
            self._server.start()
        except OSError as error:
            host, port = self._server.address
            self._server.close()
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); end what listens there, or set PORT"
            ) from error

    def stop(self) -> None:
        """Stops listening and ends what is open."""
        self._server.stop(timeout=0.5)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/livez":
            return _respond(start_response, "200 OK", {"status": "ok"})
        if path == "/readyz":
            is_ready, facts = self._readiness()
            status = "200 OK" if is_ready else "503 Service Unavailable"
            return _respond(start_response, status, {"status": "ok" if is_ready else "not ready", **facts})
        if path == "/metrics":
            return _send(start_response, "200 OK", CONTENT_TYPE, self._metrics())
        told = {"status": "not found; there are /livez, /readyz and /metrics"}
        return _respond(start_response, "404 Not Found", told)


def _respond(start_response: Callable[..., Any], status: str, body: dict[str, Any]) -> list[bytes]:
    return _send(start_response, status, "application/json", orjson.dumps(body) + b"\n")


def _send(start_response: Callable[..., Any], status: str, content_type: str, content: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", content_type), ("Content-Length", str(len(content)))])
    return [content]
