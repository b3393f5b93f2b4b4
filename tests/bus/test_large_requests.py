"""Requests that take long to work on: the bus is read before each of them, or NATS would cut us off."""

from __future__ import annotations

import socket
import threading

import gevent
import pytest

from relay.bus.client import Bus
from relay.bus.service import LARGE_BYTES, Handler, Service
from relay.submission.admission import Admission
from tests.support.nats_server import NatsServer

NATS_SUBJECT = "large.under.test"
REQUESTS = 40
SIZE_BYTES = 1_000_000


def publish_all(port: int, requests: int, size_bytes: int) -> None:
    """Publishes over a connection of its own; returns when the server has taken everything."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answers = connection.makefile("rb")
        answers.readline()
        connection.sendall(b'CONNECT {"verbose":false}\r\n')
        for _ in range(requests):
            connection.sendall(b"PUB %b %d\r\n%b\r\n" % (NATS_SUBJECT.encode(), size_bytes, b"x" * size_bytes))
        connection.sendall(b"PING\r\n")
        assert answers.readline() == b"PONG\r\n"


def seen_at_each(bus: Bus, port: int, size_bytes: int) -> list[int]:
    """How many requests were read when each was begun; the first keeps the thread until NATS has taken all others."""
    gate = Admission(limit=1000, limit_bytes=1_000_000_000, busy_above=1000)
    seen: list[int] = []

    def answer(*_: object) -> bytes:
        if not seen:  # this process is not patched: nothing else runs in it meanwhile
            publish_all(port, REQUESTS, size_bytes)
        seen.append(service.in_hand + service.answered)
        threading.Event().wait(0.02)
        return b""

    service = Service(
        bus,
        nats_subject=NATS_SUBJECT,
        queue_group="q",
        handler=Handler(answer, overloaded=b"", broken=b"", too_large=b""),
        gate=gate,
        patience_seconds=30,
        reply_prefixes=("_INBOX",),
    )
    service.start()
    bus.flush()
    publish_all(port, 1, size_bytes)
    with gevent.Timeout(20):
        while service.answered <= REQUESTS:
            gevent.sleep(0.01)
    service.stop()
    return seen


def test_the_bus_is_read_before_a_large_request_is_begun(bus: Bus, nats_server: NatsServer) -> None:
    seen = seen_at_each(bus, nats_server.port, SIZE_BYTES)
    assert seen[REQUESTS // 5] > REQUESTS * 3 / 4


def test_small_requests_are_begun_without_ado(
    bus: Bus, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_to_read: list[float] = []
    monkeypatch.setattr(bus, "let_read", asked_to_read.append)
    assert len(seen_at_each(bus, nats_server.port, LARGE_BYTES - 1)) == REQUESTS + 1
    assert not asked_to_read
