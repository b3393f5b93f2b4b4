"""The health page, and those who would keep the probes out."""

from __future__ import annotations

import contextlib
import struct
import time
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


def ask(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer; the connection is closed by the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as client:
        client.sendall(request)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body."""
    head, body = ask(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return int(head.split()[1]), body


def drip(port: int, seconds_between: float, cut_off: list[float]) -> None:
    """A client that sends its request octet by octet; notes after how long it was cut off."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=3) as client, contextlib.suppress(OSError):
        for octet in b"GET /livez HTTP/1.1\r\nX-Long: " + b"x" * 1000:
            client.sendall(bytes([octet]))
            gevent.sleep(seconds_between)
    cut_off.append(time.monotonic() - begun)


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


def test_slow_requests_end_however_their_octets_come(port: int) -> None:
    cut_off: list[float] = []
    slow = gevent.spawn(drip, port, 0.05, cut_off)
    slow.join(5)
    assert cut_off, "it had 50 s to say"
    assert cut_off[0] < 2


def test_slow_requests_do_not_keep_the_probes_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "REQUEST_SECONDS", 60)
    cut_off: list[float] = []
    slow = [gevent.spawn(drip, port, 0.05, cut_off) for _ in range(6)]
    try:
        gevent.sleep(0.2)
        begun = time.monotonic()
        assert get(port, "/livez")[0] == 200
        assert get(port, "/metrics") == (200, PAGE)
        assert time.monotonic() - begun < 2, "the oldest gave way"
    finally:
        gevent.killall(slow)


HEADERS = b"".join(b"X-%d: 1\r\n" % number for number in range(101))


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /livez HTTP/1.1\r\n" + HEADERS + b"\r\n",
        b"GET /livez HTTP/1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"\xff\r\n\r\n",
    ],
    ids=["many headers", "half a version", "no length", "no request"],
)
def test_what_is_no_request_is_refused_and_not_logged(
    port: int, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ask(port, request_)[0].split()[1] == b"400"
    assert "".join(capfd.readouterr()) == ""


def test_clients_that_go_away_or_never_end_are_not_logged(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    for begun in (b"", b"GET /liv", b"GET /livez HTTP/1.1\r\nHost:", b"GET /livez HTTP/1\r\n\r\n"):
        for is_reset in (True, False):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(begun)
            if is_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                client.settimeout(3)
                while client.recv(4096):
                    pass
            client.close()
    assert get(port, "/livez")[0] == 200
    assert "".join(capfd.readouterr()) == ""


def test_an_answer_that_is_not_taken_ends_and_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health_module, "ANSWER_SECONDS", 0.2)
    number = free_port()
    server = HealthServer("127.0.0.1", number, lambda: (True, {}), lambda: b"x" * 50_000_000)
    server.start()
    try:
        with socket.create_connection(("127.0.0.1", number), timeout=3) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            gevent.sleep(0.5)
            taken = 0
            with contextlib.suppress(ConnectionError):
                while chunk := client.recv(1_000_000):
                    taken += len(chunk)
        assert 0 < taken < 50_000_000
    finally:
        server.stop()
    assert "".join(capfd.readouterr()) == ""


def test_an_error_of_the_page_itself_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> bytes:
        raise OSError("no files left")

    number = free_port()
    server = HealthServer("127.0.0.1", number, lambda: (True, {}), fail)
    server.start()
    try:
        assert get(number, "/metrics")[0] == 500
    finally:
        server.stop()
    assert "no files left" in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/nothing"])
def test_head_is_get_without_the_body(port: int, path: str) -> None:
    heads = []
    for method in ("GET", "HEAD"):
        head, body = ask(port, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        heads.append([line for line in head.splitlines() if not line.startswith(b"Date:")])
        assert bool(body) == (method == "GET")
    assert heads[0] == heads[1]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_not_allowed(port: int, method: str) -> None:
    head, body = ask(port, f"{method} /livez HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    assert head.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD" in head
    assert b"GET and HEAD" in body


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # gevent leaves the socket it could not bind
def test_a_taken_port_is_said_in_one_sentence(port: int) -> None:
    second = HealthServer("127.0.0.1", port, lambda: (True, {}), lambda: b"")
    with pytest.raises(ConfigError, match=f"port {port} .* set PORT"):
        second.start()
    second.stop()
