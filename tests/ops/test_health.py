"""The health page, and those who would keep the probes out."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from gevent import socket

from relay.errors import ConfigError
from relay.ops import health as health_module
from relay.ops.health import HealthServer
from tests.support.nats_server import free_port

PAGE = b"relay_build_info 1.0\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a started health page that takes two connections at a time."""
    monkeypatch.setattr(health_module, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(health_module, "REQUEST_SECONDS", 0.2)
    number = free_port()
    server = HealthServer("127.0.0.1", number, lambda: (False, {"nats": "away"}), lambda: PAGE)
    server.start()
    yield number
    server.stop()


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body; the connection is closed by the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_alive_and_not_ready(port: int) -> None:
    assert get(port, "/livez")[0] == 200
    status, body = get(port, "/readyz")
    assert status == 503
    assert b'"nats":"away"' in body


def test_metrics_and_what_is_not_there(port: int) -> None:
    assert get(port, "/metrics") == (200, PAGE)
    status, body = get(port, "/")
    assert status == 404
    for path in (b"/livez", b"/readyz", b"/metrics"):
        assert path in body


def test_idle_connections_do_not_keep_the_probes_out(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
    try:
        with gevent.Timeout(5):
            assert get(port, "/livez")[0] == 200
    finally:
        for each in idle:
            each.close()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # gevent leaves the socket it could not bind
def test_a_taken_port_is_said_in_one_sentence(port: int) -> None:
    second = HealthServer("127.0.0.1", port, lambda: (True, {}), lambda: b"")
    with pytest.raises(ConfigError, match=f"port {port} .* set PORT"):
        second.start()
    second.stop()
