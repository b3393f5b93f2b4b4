"""The health page: ``/livez`` and ``/readyz`` on PORT, as lfx has them, and ``/metrics`` for Prometheus.

``/livez`` is 200 while the process runs; ``/readyz`` is 200 when NATS is connected, else 503. The body of
``/readyz`` says more, as JSON. Served by gevent's own WSGI server, meant for probes and scrapers, not for the Internet.

Whoever reaches PORT may open connections: none of them keeps the probes out, and nothing that a client does is logged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import orjson
from gevent import Greenlet, GreenletExit, Timeout, getcurrent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from relay.errors import ConfigError
from relay.ops.metrics import CONTENT_TYPE

MAX_CONNECTIONS = 500
"""With a hundred that may be taken at once, less than the 1,024 files that many systems let a process open."""
REQUEST_SECONDS = 2.0
"""For the whole of it, however its octets come."""
ANSWER_SECONDS = 5.0
"""For making the answer and having it taken."""
METHODS = frozenset({"GET", "HEAD"})


class _Handler(WSGIHandler):  # type: ignore[misc]
    """One request a connection, and only so long to send it: slow connections must not keep the probes out."""

    _patience: Timeout

    def handle(self) -> None:
        # An error of the page itself is dealt with in handle_one_response: here it is the connection's.
        with contextlib.suppress(OSError), Timeout(REQUEST_SECONDS, False) as self._patience:
            super().handle()

    def read_request(self, raw_requestline: str) -> bool:
        try:
            is_readable = bool(super().read_request(raw_requestline))
        except Exception as error:  # all of it is the client's doing; what is no ValueError would be printed
            raise ValueError(f"{type(error).__name__} while reading the request") from error
        self.close_connection = True
        return is_readable

    def handle_one_response(self) -> None:
        self._patience.cancel()
        with Timeout(ANSWER_SECONDS, False):
            super().handle_one_response()

    def handle_error(self, t: type[BaseException], v: BaseException, tb: TracebackType | None) -> None:
        if issubclass(t, Timeout | TimeoutError | GreenletExit):
            self.close_connection = True  # the client did not take its answer, or gave way
        else:
            super().handle_error(t, v, tb)


class _Server(WSGIServer):  # type: ignore[misc]
    """Takes every connection; when there are ``MAX_CONNECTIONS``, the oldest gives way to the newest."""

    def __init__(self, address: tuple[str, int], application: Callable[..., Iterable[bytes]]) -> None:
        super().__init__(address, application, log=None, error_log=None, spawn=Pool(), handler_class=_Handler)
        self._open: dict[Greenlet, None] = {}

    def handle(self, sock: Any, address: Any) -> None:
        """One connection, in its own greenlet."""
        this = getcurrent()
        if len(self._open) >= MAX_CONNECTIONS:
            # Probes send their request at once and are answered at once: the oldest is somebody else's.
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.kill(block=False)
        self._open[this] = None
        try:
            super().handle(sock, address)
        finally:
            self._open.pop(this, None)


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
        self._server = _Server((host, port), self._answer)

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
        method = environ["REQUEST_METHOD"]
        if method not in METHODS:
            told = {"status": "method not allowed; there are GET and HEAD"}
            return _respond(start_response, "405 Method Not Allowed", told, ("Allow", "GET, HEAD"))
        content = self._page(environ, start_response)
        return content if method == "GET" else []

    def _page(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
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


def _respond(
    start_response: Callable[..., Any], status: str, body: dict[str, Any], *headers: tuple[str, str]
) -> list[bytes]:
    return _send(start_response, status, "application/json", orjson.dumps(body) + b"\n", *headers)


def _send(
    start_response: Callable[..., Any], status: str, content_type: str, content: bytes, *headers: tuple[str, str]
) -> list[bytes]:
    start_response(status, [("Content-Type", content_type), ("Content-Length", str(len(content))), *headers])
    return [content]
